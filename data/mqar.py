"""Diffuse multi-query associative recall: keys of several tokens, among distractors that share a key's beginning. Example sets.

  data/mqar.py                                         # data/mqar_{train,val,test}.safetensors
  data/mqar.py --pairs 4 --queries 4 --lag 24 64 --test-lag 65 256 --train 500 --val 100 --test 100 --prefix /tmp/mqar
  ./train_sessa --data data/mqar_train.safetensors --val data/mqar_val.safetensors --dim 128 --layers 4 \
    --out mqar.safetensors

The task is the Sessa paper's (arXiv 2604.18580), after Arora et al. 2024; it publishes no parameters, these are ours. An example is

  <bos> key value … key value <noise> noise … noise <query> key value … key value

Every key has its own value; every query is one of the keys, in random order, and its value is what is asked for: the targets are
the values' tokens after <query>, each at the token before it. The noise looks like more pairs: a part of it (--distractors) are
keys of this example with their last tokens changed, followed by a random value, the others are random tokens of the alphabets.

Whoever knows the values but matches no key can still strike out those already given as answers, and scores
(1/K + 1/(K-1) + … + 1/(K-Q+1)) / Q of K pairs and Q queries, and a little more, as two keys may have the same value
(dev/claims/curriculum.py --plateau counts it). With --repeat each query is any of the keys, whatever was asked before: nothing
can be struck out, and what remains is 1/K and a little more. A key asked for again has its answer nearby, which its lag says.

The lag of a target is the number of tokens between the value's place after <query> and its place among the pairs, or behind the
last query for the same key; the tensor `lags` (N,T) holds it, 0 where there is no target. An example's lag, drawn uniformly from
LOW to HIGH (--lag for training and validation, --test-lag for the test: up to four times as far), is the one from the middle of
the pairs to the middle of the queries, and decides how much noise there is. Shorter examples are filled up at their end. The same
seed gives the same bytes.
"""
import argparse
import os

import numpy as np

from example_set import Stream, padded, write_examples

BOS, NOISE, QUERY, SPECIAL = 0, 1, 2, 3     # then the keys' alphabet, then the values'


def word(stream, first, symbols, length):
    return tuple(first + stream.integer(0, symbols - 1) for _ in range(length))


def noise_length(o, lag):
    """Tokens of noise, between <noise> and <query>, of an example with this lag."""
    return lag - (o.pairs + o.queries) * (o.key_length + o.value_length) // 2 - 2


def example(stream, o, lag):
    """(token ids, targets, lags), each a list."""
    first_value = SPECIAL + o.key_symbols
    pairs = {}
    while len(pairs) < o.pairs:
        pairs.setdefault(word(stream, SPECIAL, o.key_symbols, o.key_length), word(stream, first_value, o.value_symbols, o.value_length))
    keys, ids = list(pairs), [BOS]
    place = {}
    for key in keys:
        place[key] = len(ids) + o.key_length
        ids += key + pairs[key]
    ids.append(NOISE)
    end = len(ids) + noise_length(o, lag)
    while len(ids) < end:
        key = keys[stream.integer(0, o.pairs - 1)]
        other = key[:o.shared] + word(stream, SPECIAL, o.key_symbols, o.key_length - o.shared)
        if stream.uniform() < o.distractors and other not in pairs:
            ids += other + word(stream, first_value, o.value_symbols, o.value_length)
        else:
            ids.append(SPECIAL + stream.integer(0, o.key_symbols + o.value_symbols - 1))
    ids[end:] = [QUERY]
    targets, lags = [-1] * len(ids), [0] * len(ids)
    if o.repeat:
        keys = [keys[stream.integer(0, o.pairs - 1)] for _ in range(o.queries)]
    else:
        stream.shuffle(keys)
    for key in keys[:o.queries]:
        value = pairs[key]
        far = len(ids) + o.key_length - place[key]
        place[key] += far
        ids += key + value
        targets += [-1] * (o.key_length - 1) + list(value) + [-1]
        lags += [0] * (o.key_length - 1) + [far] * o.value_length + [0]
    return ids, targets, lags


def examples(n, seed, o, lags):
    """(inputs, targets, lags), each (n,T), T what the longest lag needs."""
    stream, width = Stream(seed), o.pairs + o.queries
    width = 3 + width * (o.key_length + o.value_length) + noise_length(o, lags[1])
    made = [example(stream, o, stream.integer(*lags)) for _ in range(n)]
    return [padded([row[i] for row in made], width, filler) for i, filler in enumerate((BOS, -1, 0))]


def parse(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for split, n in (("train", 20000), ("val", 1000), ("test", 1000)):
        parser.add_argument(f"--{split}", type=int, default=n, help=f"examples, 0: no such file [{n}]")
    for name, default, text in (
            ("key-symbols", 16, "alphabet of the keys"), ("key-length", 3, "tokens of a key"), ("shared", 2, "tokens that a distractor shares"),
            ("value-symbols", 128, "alphabet of the values"), ("value-length", 1, "tokens of a value"),
            ("pairs", 16, "pairs of an example"), ("queries", 8, "of them asked for"), ("seed", 0, "of the examples")):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} [{default}]")
    parser.add_argument("--repeat", action="store_true", help="a query may be for a key that was asked for before")
    parser.add_argument("--distractors", type=float, default=0.75, help="part of the noise's draws that are distractors [0.75]")
    parser.add_argument("--lag", type=int, nargs=2, default=(64, 192), metavar=("LOW", "HIGH"), help="training and validation [64 192]")
    parser.add_argument("--test-lag", type=int, nargs=2, default=(193, 768), metavar=("LOW", "HIGH"), help="[193 768]")
    parser.add_argument("--prefix", default=os.path.join(os.path.dirname(os.path.abspath(__file__)), "mqar"),
                        help="files are PREFIX_train.safetensors … [data/mqar]")
    o = parser.parse_args(arguments)
    if min(o.train, o.val, o.test, o.seed) < 0:
        parser.error("numbers of examples and the seed must not be negative")
    if min(o.key_symbols, o.value_symbols, o.value_length, o.queries) < 1 or (o.queries > o.pairs and not o.repeat):
        parser.error("alphabets and lengths must be positive, and there can be no more queries than pairs without --repeat")
    if not 0 <= o.shared < o.key_length or o.pairs > o.key_symbols ** o.key_length / 2:
        parser.error("--shared must be less than --key-length, and --pairs at most half of all keys")
    if not 0 <= o.distractors <= 1:
        parser.error("--distractors is a part, from 0 to 1")
    for low, high in (o.lag, o.test_lag):
        if high < low or noise_length(o, low) < 0:
            parser.error(f"the lag {low} is too short for {o.pairs} pairs and {o.queries} queries, or longer than {high}")
    return o


def main():
    o = parse()
    settings = {name: getattr(o, name) for name in ("key_symbols", "key_length", "shared", "value_symbols", "value_length", "pairs",
                                                    "queries", "distractors", "seed")}
    if o.repeat:
        settings["repeat"] = 1
    for i, (split, lags) in enumerate((("train", o.lag), ("val", o.lag), ("test", o.test_lag))):
        n, path = getattr(o, split), f"{o.prefix}_{split}.safetensors"
        if not n:
            continue
        inputs, targets, far = examples(n, [o.seed, i], o, lags)
        vocab = SPECIAL + o.key_symbols + o.value_symbols
        write_examples(path, {"vocab_size": vocab, "task": "mqar", "split": split, "lag_low": lags[0], "lag_high": lags[1], **settings},
                       inputs=inputs, targets=targets, lags=far)
        print(f"{path}: {n} examples of {inputs.shape[1]} tokens, vocabulary {vocab}, lags {far[far > 0].min()} to {far.max()}, "
              f"mean {np.mean(far[far > 0]):.1f}")


if __name__ == "__main__":
    main()
