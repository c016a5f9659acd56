"""From a model's files to numbers.

This package turns one model into numbers and knows no other model:

- `checkpoint` opens a model of any known format as a list of streamed tensors;
- `readers` holds one file per format, chosen by content;
- `discovery` says which models a path holds;
- `fingerprint` makes the compact record that the catalogue keeps.

It imports nothing from `index` or `lineage`.
"""
