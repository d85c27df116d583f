#!/bin/bash
# Take a part that benchmark/gpu/data.py made: bash benchmark/gpu/unpack.sh .gpu/1 [data/gpu]
# The last part joins them all. Of .gpu/extra everything goes to DATA/extra as it is.
set -euo pipefail
part=$1
data=${2:-data/gpu}
mkdir -p "$data"
if [ "$(basename "$part")" = extra ]; then
    mkdir -p "$data/extra"
    cp -r "$part/." "$data/extra/"
    echo "extra: $(du -sh "$data/extra" | cut -f1)"
    exit 0
fi
read -r number count < "$part/place"
mv "$part/data.part" "$data/part.$number"
echo "part $number of $count"
if [ "$(find "$data" -maxdepth 1 -name 'part.*' | wc -l)" -eq "$count" ]; then
    for ((k = 1; k <= count; k++)); do cat "$data/part.$k"; done | tar -x -C "$data"
    rm "$data"/part.*
    ls -l "$data"
fi
