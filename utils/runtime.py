"""Where and in which precision a stage computes, and its random numbers."""

import contextlib
import ctypes
import os
import platform

import torch

from utils import distributed
from utils.errors import UserError


class Runtime:
    """Device, autocast and random generators of one stage; the parameters are the flags of
    :func:`utils.cli.add_running_args`."""

    def __init__(self, device="auto", precision="auto", seed=0, deterministic=False):
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = distributed.start(device)
        if self.device.type != "cpu":
            _try_out(self.device)
        if precision == "auto":
            precision = "bf16" if _has_bfloat16(self.device) else "fp32"
        self.precision, self.seed = precision, seed
        torch.manual_seed(seed)
        if self.device.type == "cuda":
            if self.device.index is not None:  # where streams, graphs and synchronize belong as well
                torch.cuda.set_device(self.device)
            torch.backends.cudnn.allow_tf32 = False  # on by default: convolutions of --precision fp32 would not be
            torch.backends.cudnn.benchmark = not deterministic
            if deterministic:
                os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
                torch.use_deterministic_algorithms(True)
        elif self.device.type == "cpu":
            _keep_freed_memory()
            if "OMP_NUM_THREADS" not in os.environ:  # PyTorch counts the machine's processors, not those allowed
                torch.set_num_threads(usable_processors())

    @classmethod
    def of(cls, args):
        """From parsed flags; a stage that does not train has no --precision, and one that draws nothing no --seed."""
        return cls(args.device, getattr(args, "precision", "fp32"), getattr(args, "seed", 0), args.deterministic)

    def autocast(self):
        """The context in which forward passes run; parameters, losses and updates stay in float32."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def place(self, module):
        """Move a network to the device, convolutions in channels_last."""
        return module.to(self.device, memory_format=torch.channels_last)

    def captured(self, network, batch_size, image_size):
        """The network, on one CUDA device with its forward and backward pass in training recorded as CUDA graphs, for
        float32 batches (batch_size, 3, image_size, image_size) and no other; else it is as it was.

        A small network's pass is hundreds of short kernels, which Python starts more slowly than a GPU ends them. A
        graph starts the same kernels at once.
        """
        if self.device.type != "cuda" or distributed.ranks > 1 or torch.version.hip:
            return network
        before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        x = torch.randn(batch_size, 3, image_size, image_size, device=self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16", cache_enabled=False):
            torch.cuda.make_graphed_callables(network.train(), (x.contiguous(memory_format=torch.channels_last),))
        network.load_state_dict(before)  # the passes before the recording have moved batch norm's statistics
        return network

    def generator(self, *indices):
        """A generator on the device, seeded by the run's seed and by indices (the epoch, say).

        An epoch's draws depend on nothing that came before it, so a run that is resumed on the same kind of device
        repeats them.
        """
        seed = self.seed
        for index in indices:
            seed = (seed * 1_000_003 + index + 1) % 2**63
        return torch.Generator(self.device).manual_seed(seed)

    def describe(self):
        """Hardware and versions, for the head of a log."""
        hardware = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else cpu_name()
        return {"device": self.device.type, "hardware": hardware, "threads": torch.get_num_threads(),
                "ranks": distributed.ranks, "precision": self.precision, "python": platform.python_version(),
                "torch": torch.__version__}


def _try_out(device):
    """Raise UserError, with PyTorch's reason, when the GPU cannot be used: there is none, its driver is too old, or
    this build of PyTorch has no kernels for it."""
    try:
        torch.ones(1, device=device).add_(1)
    except (RuntimeError, AssertionError, ImportError) as error:
        if "out of memory" in str(error):  # others use this GPU
            raise
        raise UserError(f"PyTorch cannot compute on {device} here ({str(error).strip().splitlines()[0]}): install a "
                        f"build of PyTorch for this GPU and driver, or use --device cpu") from None


def _keep_freed_memory():
    """Let glibc keep what a step frees for the next one. It would hand large tensors back to the system, and much of a
    step's time would go into page faults. Elsewhere nothing happens."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: never
        mallopt(-4, 0)  # M_MMAP_MAX: no mapping of its own for a large block


def usable_processors():
    """Number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _has_bfloat16(device):
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)  # older ones emulate it, slowly
    # without these instructions the CPU's bfloat16 is slower than its float32
    return torch.cpu._is_avx512_bf16_supported()


def cpu_name():
    """The processor's name, as far as the system tells it."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        for line in file:
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
