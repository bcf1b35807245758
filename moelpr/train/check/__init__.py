"""One rank of any cluster, run on a machine without a GPU: the real trainer on tensors without values.

`fake_cuda` and `fake_megatron` replace what would ask a GPU or other ranks, `meter` counts, `one_rank` runs the trainer
in a process of its own, `whole_run` several ranks, and `cost` and `tables` say what the counts mean.
docs/design/planner.md says what a dry run can't see.
"""
