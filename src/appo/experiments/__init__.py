"""What a paper's authors run, on top of everything: the demo, comparisons, studies and memory plans.

Only the command line imports from here. `demo` trains the embedded world's policy once, `compare` trains methods x
seeds, `study` separates perceiving from reasoning, `plan` computes whether a run fits its GPUs.
"""
