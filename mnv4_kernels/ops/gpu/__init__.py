"""What the Triton kernels share: device functions, launch configs, cost model and gate.

Only `device`, `depthwise` and the ops' `triton_*` modules import Triton; everything else here is
plain Python, so that a machine without Triton can still read configs and plans.
"""
