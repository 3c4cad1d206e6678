"""What a rule makes of fine-tuned weights: the one maker of fused models, and the folders that hold them.

Import from the files of this room: ``fuse`` starts without the libraries that only models in memory need.
"""
