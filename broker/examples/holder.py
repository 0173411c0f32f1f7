# A lease in any language: `varlinkctl --exec` has the answer on standard input, and the lease as
# descriptor 3.
import json, mmap, sys

lease = json.load(sys.stdin)
with mmap.mmap(3, lease["size"]) as memory:
    memory[0:5] = b"hello"
    print("lease", lease["lease"], "of", lease["device"] + ":", memory[0:5].decode())
