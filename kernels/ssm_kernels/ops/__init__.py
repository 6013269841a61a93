"""One room for each op: its public functions and checks, its reference, its CPU code and its GPU code.

``ssm_kernels.ops.selective_scan`` is the room, ``ssm_kernels.selective_scan`` the function.
"""
