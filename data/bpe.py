"""A text as token shards of words: byte pair encoding, trained on the text by the tokenizers library.

  data/bpe.py data/tinyshakespeare.txt --vocab 1024
  ./train_sessa --data data/tinyshakespeare_train.bin --val data/tinyshakespeare_val.bin --out words.safetensors
  data/bpe.py other.txt --tokenizer data/tinyshakespeare_tokenizer.json     # more text in the same words
  data/bpe.py other.txt --tokenizer tokenizer.json                          # in the words of another model

Writes PREFIX_train.bin and PREFIX_val.bin (llm.c's shards), PREFIX_words.safetensors, which train_sessa finds
beside them, and PREFIX_tokenizer.json. The last tenth of the text validates, as train_sessa has it, or --val;
words are learnt from the rest.

Before it is encoded, text is cut into pieces by its bytes alone. A piece is the first of these that fits:

  1. a space or none, then a run of letters: A to Z, a to z, and all bytes from 0x80 on
  2. a space or none, then one to three digits
  3. a space or none, then a run of other bytes that are no white space (space, \\t, \\n, \\v, \\f, \\r)
  4. a run of white space; where it is longer than one byte, ends with a space and something follows, without
     that space

In a piece, which begins as its bytes, the pair of neighbours that was learnt first becomes one token, the
leftmost of equal ones, until no such pair is left. train_sessa does the same with a prompt. The words' file
holds

  tokenizer.tokens   U8 (n)     all tokens' bytes, one token behind the other
  tokenizer.offsets  I64 (V+1)  where each begins, and where the last ends
  tokenizer.merges   I32 (M,2)  the pairs of ids in the order in which they were learnt

Another model's tokenizer.json cuts text in another way: its words are written without merges, train_sessa
prints them and takes prompts as ids. Its special tokens have their names as bytes. Needs `pip install
tokenizers safetensors numpy`.
"""
import argparse
import json
import os
import re
import sys

import numpy as np

from simplestories import module, write_shard

LETTERS, DIGITS, SPACES = r"A-Za-z\x{80}-\x{10FFFF}", "0-9", r" \t\n\x0B\f\r"
PIECES = (f" ?[{LETTERS}]+| ?[{DIGITS}]{{1,3}}| ?[^{LETTERS}{DIGITS}{SPACES}]+|"
          f"[{SPACES}]+(?= [^{SPACES}])|[{SPACES}]+")
PART = 1 << 20      # characters that are encoded at a time


def byte_letters():
    """The letter that stands for each byte in the library's vocabularies (GPT-2's)."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {**{byte: chr(byte) for byte in shown}, **{byte: chr(256 + i) for i, byte in enumerate(hidden)}}


def cutter():
    """The rule above, as the library has it."""
    of = module("tokenizers.pre_tokenizers")
    pieces = of.Split(module("tokenizers").Regex(PIECES), "isolated")
    return of.Sequence([pieces, of.ByteLevel(add_prefix_space=False, use_regex=False)])


def parts(text):
    """The text in parts, cut where any piece ends: between a new line and what is no white space."""
    begin = 0
    while begin < len(text):
        cut = re.compile(r"\n(?=[^ \t\n\x0b\f\r])").search(text, begin + PART)
        end = cut.end() if cut else len(text)
        yield text[begin:end]
        begin = end


def train(text, vocab):
    """A tokenizer of up to so many tokens, of which 256 are the bytes."""
    tokenizers = module("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = cutter()
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = sorted(byte_letters().values())
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab, min_frequency=2, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(parts(text), trainer)
    return tokenizer


def cuts_alike(tokenizer):
    """Whether a tokenizer encodes by the rule above and nothing else, as those that train() makes do."""
    said = json.loads(tokenizer.to_str())
    model, ours = said["model"], json.loads(cutter().__getstate__())
    more = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges")
    plain = model["type"] == "BPE" and not any(model.get(key) for key in more)
    alone = said["pre_tokenizer"] == ours and not said["normalizer"] and not said["added_tokens"]
    return plain and alone and set(byte_letters().values()) <= set(model["vocab"])


def token_bytes(tokenizer):
    """The bytes that each id of a tokenizer adds to a text."""
    said = json.loads(tokenizer.to_str())
    special = {token["id"]: token["content"] for token in said["added_tokens"]}
    byte_of = {letter: byte for byte, letter in byte_letters().items()}
    by_bytes = "ByteLevel" in json.dumps([said["decoder"], said["pre_tokenizer"]])
    ordinary = (i for i in range(tokenizer.get_vocab_size()) if i not in special)
    anchor = next((i for i in ordinary if tokenizer.decode([i]).strip().isalpha()), 0)
    before = tokenizer.decode([anchor])     # where a text begins some decoders leave out a space
    words = []
    for i in range(max(tokenizer.get_vocab().values()) + 1):
        name = tokenizer.id_to_token(i) or ""
        if i in special:
            words.append(special[i].encode())
        elif by_bytes and set(name) <= set(byte_of):
            words.append(bytes(byte_of[letter] for letter in name))
        elif re.fullmatch("<0x[0-9A-Fa-f]{2}>", name):
            words.append(bytes([int(name[3:5], 16)]))
        else:
            both = tokenizer.decode([anchor, i], skip_special_tokens=False)
            words.append((both[len(before):] if both.startswith(before) else name).encode())
    return words


def write_words(path, tokenizer):
    """The words' file; the number of words."""
    words = token_bytes(tokenizer)
    offsets = np.cumsum([0] + [len(word) for word in words], dtype=np.int64)
    tensors = {"tokenizer.tokens": np.frombuffer(b"".join(words), dtype=np.uint8), "tokenizer.offsets": offsets}
    if cuts_alike(tokenizer):
        merges = json.loads(tokenizer.to_str())["model"]["merges"]
        pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in merges]     # older versions write "a b"
        ids = [[tokenizer.token_to_id(word) for word in pair] for pair in pairs]
        tensors["tokenizer.merges"] = np.array(ids, dtype=np.int32).reshape(-1, 2)
    try:
        with open(path + ".part", "wb") as file:
            file.write(module("safetensors.numpy").save(tensors))
        os.replace(path + ".part", path)
    except OSError as error:
        sys.exit(f"{path}: {error.strerror}")
    merges = f"{len(pairs)} merges" if "tokenizer.merges" in tensors else "without merges"
    print(f"{path}: {len(words)} words, {merges}")
    return len(words)


def encode(tokenizer, text):
    """The ids of a text."""
    pieces = parts(text) if cuts_alike(tokenizer) else [text]
    ids = [np.array(tokenizer.encode(piece, add_special_tokens=False).ids, dtype="<u4") for piece in pieces]
    return np.concatenate(ids) if ids else np.zeros(0, dtype="<u4")


def read_text(path):
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        sys.exit(f"{path}: {error.strerror}")


def decode_text(path, text):
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        sys.exit(f"{path}: not a text in UTF-8, at byte {error.start}")


def split(text):
    """The first ⌊0.9 n⌋ bytes and the rest, but for a character that stands across."""
    cut = len(text) * 9 // 10
    while 0 < cut < len(text) and text[cut] & 0xC0 == 0x80:
        cut -= 1
    return text[:cut], text[cut:]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", help="a text in UTF-8")
    parser.add_argument("--val", help="validation text, in place of the last tenth")
    parser.add_argument("--vocab", type=int, default=1024, help="tokens, 256 or more [1024]")
    parser.add_argument("--tokenizer", help="tokenizer.json, in place of training one")
    parser.add_argument("--prefix", help="files are PREFIX_train.bin, ... [the text's name without its ending]")
    o = parser.parse_args()
    if not 256 <= o.vocab <= 1 << 16:
        parser.error("--vocab takes 256, the bytes, to 65536")
    prefix = o.prefix or os.path.splitext(o.text)[0]
    text = read_text(o.text)
    texts = (text, read_text(o.val)) if o.val else split(text)
    texts = decode_text(o.text, texts[0]), decode_text(o.val or o.text, texts[1])

    if o.tokenizer:
        try:
            tokenizer = module("tokenizers").Tokenizer.from_file(o.tokenizer)
        except Exception as error:      # the package has no class of its own for this
            sys.exit(f"{o.tokenizer}: {error}")
    else:
        tokenizer = train(texts[0], o.vocab)
    words = write_words(prefix + "_words.safetensors", tokenizer)
    if not o.tokenizer and words < o.vocab:
        print(f"no pair of the text's that is left stands there twice: {words} words instead of {o.vocab}")
    for name, part in zip(("train", "val"), texts):
        write_shard(f"{prefix}_{name}.bin", encode(tokenizer, part), wide=words > 1 << 16)
    if not o.tokenizer:
        tokenizer.save(prefix + "_tokenizer.json")


if __name__ == "__main__":
    main()
