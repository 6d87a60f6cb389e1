#!/bin/sh
# Fetches TinyShakespeare (1.1 MB, the text of karpathy/char-rnn) to data/tinyshakespeare.txt and checks its sha256.
# Already there: nothing to do. Not to be had: one line, exit code 1, and nothing is left behind.
set -u
url=https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt
sum=86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed
file=$(dirname "$0")/tinyshakespeare.txt

sha256() {
    if command -v sha256sum >/dev/null 2>&1; then sha256sum "$1"; else shasum -a 256 "$1"; fi | cut -d ' ' -f 1
}

if [ -f "$file" ]; then
    [ "$(sha256 "$file")" = "$sum" ] && exit 0
    echo "$file is there but is not TinyShakespeare (its sha256 differs): move it away to fetch it again" >&2
    exit 1
fi
part=$file.part.$$
trap 'rm -f "$part"' EXIT
if command -v curl >/dev/null 2>&1; then
    curl --fail --silent --location --connect-timeout 10 --max-time 120 --output "$part" "$url"
elif command -v wget >/dev/null 2>&1; then
    wget --quiet --timeout=10 --tries=1 --output-document="$part" "$url"
else
    echo "TinyShakespeare cannot be fetched: neither curl nor wget is here ($url)" >&2
    exit 1
fi
if [ ! -s "$part" ]; then
    echo "TinyShakespeare cannot be fetched from $url" >&2
    exit 1
fi
if [ "$(sha256 "$part")" != "$sum" ]; then
    echo "what $url holds is not TinyShakespeare (its sha256 differs)" >&2
    exit 1
fi
mv "$part" "$file"
