"""Scripts in a process of their own, which sees the CPU as several devices."""

import os
import subprocess
import sys


def printed_on_devices(n, script):
    """What a script prints where JAX sees n CPU devices; fails with its messages if it does."""
    environment = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={n}",
                                "JAX_PLATFORMS": "cpu"}  # fmt: skip
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True,
                          text=True, timeout=600)  # fmt: skip
    assert done.returncode == 0, done.stderr[:3000] + done.stderr[-3000:]
    return done.stdout.strip()
