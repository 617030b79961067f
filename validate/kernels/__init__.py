"""Real kernels: Triton code beside its float64 reference, and what a profile needs of both.

`python -m validate.profile` runs from a bare checkout on machines that install nothing, so this
package imports torch, triton, numpy and our own lower floors, and nothing else.
"""
