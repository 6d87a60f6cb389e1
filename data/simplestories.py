"""SimpleStories (arXiv 2504.09184) as token shards: data/simplestories_train.bin and data/simplestories_val.bin.

  data/simplestories.py                                # fetches 2 of the 7 files of stories, and the tokenizer
  data/simplestories.py --files 7
  data/simplestories.py --text train.txt --val-text val.txt --tokenizer tokenizer.json    # from stories that are there already
  ./train_sessa --data data/simplestories_train.bin --val data/simplestories_val.bin --vocab 4096 \
    --out simplestories.safetensors

Stories come from the dataset SimpleStories/SimpleStories, the tokenizer (4,096 tokens) from SimpleStories/SimpleStories-1.25M,
both on huggingface.co. A text file holds one story a paragraph: empty lines stand between stories. Each story ends with the
tokenizer's end token. Shards are llm.c's: 256 int32 (magic 20240520, version 1, number of tokens), then uint16 tokens.
Needs `pip install tokenizers`, and pyarrow to read what is fetched. Without a network: one line and exit code 1.
"""
import argparse
import os
import sys
import urllib.request

import numpy as np

MAGIC, VERSION, HEADER = 20240520, 1, 256
WIDE_MAGIC, WIDE_VERSION = 20240801, 7      # ids of 32 bits
HOST = "https://huggingface.co"
STORIES = HOST + "/datasets/SimpleStories/SimpleStories/resolve/main/data/{split}-{i:05d}-of-{n:05d}.parquet"
TOKENIZER = HOST + "/SimpleStories/SimpleStories-1.25M/resolve/main/tokenizer.json"
FILES = {"train": 7, "test": 1}
FOLDER = os.path.dirname(os.path.abspath(__file__))


def fetch(url, path):
    """Downloads url to path, unless it is there."""
    if os.path.exists(path):
        return path
    part = f"{path}.part.{os.getpid()}"
    try:
        with urllib.request.urlopen(url, timeout=30) as response, open(part, "wb") as file:
            while block := response.read(1 << 20):
                file.write(block)
        os.replace(part, path)
    except OSError as error:        # URLError and time-outs are OSErrors
        sys.exit(f"SimpleStories cannot be fetched from {url}: {getattr(error, 'reason', error)}")
    finally:
        if os.path.exists(part):
            os.remove(part)
    return path


def module(name):
    try:
        return __import__(name, fromlist=["*"])
    except ImportError:
        sys.exit(f"this needs the Python package {name.split('.')[0]}: pip install {name.split('.')[0]}")


def stories_of_text(path):
    """The paragraphs of a text file; a story's own line breaks stay."""
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
    except (OSError, UnicodeDecodeError) as error:
        sys.exit(f"{path}: {getattr(error, 'strerror', None) or 'not a text in UTF-8'}")
    return [story.strip() for story in text.replace("\r\n", "\n").split("\n\n") if story.strip()]


def stories_of_parquet(path):
    return module("pyarrow.parquet").read_table(path, columns=["story"])["story"].to_pylist()


class Tokenizer:
    def __init__(self, path):
        try:
            self.tokenizer = module("tokenizers").Tokenizer.from_file(path)
        except Exception as error:      # the package has no class of its own for this
            sys.exit(f"{path}: {error}")
        ends = [self.tokenizer.token_to_id(name) for name in ("[EOS]", "<|endoftext|>", "</s>")]
        self.end = next((end for end in ends if end is not None), None)
        self.size = self.tokenizer.get_vocab_size()
        if self.end is None or self.size > 1 << 16:
            sys.exit(f"{path}: a tokenizer without an end token, or of more than 65,536 tokens")

    def encode(self, stories):
        """The ids of all stories, each followed by the end token."""
        ids = []
        for batch in self.tokenizer.encode_batch(stories, add_special_tokens=False):
            ids += batch.ids + [self.end]
        return ids


def write_shard(path, ids, wide=False):
    """An llm.c token shard, of GPT-2's kind or, wide, of Llama 3's."""
    if len(ids) > 2**31 - 1:
        sys.exit(f"{path}: {len(ids)} tokens are more than a shard can hold")
    header = np.zeros(HEADER, dtype="<i4")
    header[:3] = (WIDE_MAGIC, WIDE_VERSION, len(ids)) if wide else (MAGIC, VERSION, len(ids))
    try:
        with open(path + ".part", "wb") as file:
            file.write(header.tobytes() + np.asarray(ids).astype("<u4" if wide else "<u2").tobytes())
        os.replace(path + ".part", path)
    except OSError as error:
        sys.exit(f"{path}: {error.strerror}")
    print(f"{path}: {len(ids)} tokens")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=2, help=f"files of training stories to fetch, 1 to {FILES['train']} [2]")
    parser.add_argument("--text", help="training stories, in place of fetched ones")
    parser.add_argument("--val-text", help="validation stories")
    parser.add_argument("--tokenizer", help="tokenizer.json, in place of the fetched one")
    parser.add_argument("--prefix", default=os.path.join(FOLDER, "simplestories"), help="files are PREFIX_train.bin, PREFIX_val.bin")
    o = parser.parse_args()
    if bool(o.text) != bool(o.val_text):
        parser.error("--text and --val-text go together")
    if not 1 <= o.files <= FILES["train"]:
        parser.error(f"--files takes 1 to {FILES['train']}")

    tokenizer = Tokenizer(o.tokenizer or fetch(TOKENIZER, o.prefix + "_tokenizer.json"))
    for split, name, text, n in (("train", "train", o.text, o.files), ("val", "test", o.val_text, 1)):
        ids = []
        if text:
            ids = tokenizer.encode(stories_of_text(text))
        else:
            for i in range(n):
                url = STORIES.format(split=name, i=i, n=FILES[name])
                ids += tokenizer.encode(stories_of_parquet(fetch(url, f"{o.prefix}_{name}_{i}.parquet")))
        write_shard(f"{o.prefix}_{split}.bin", ids)


if __name__ == "__main__":
    main()
