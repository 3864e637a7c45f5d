"""Time and memory of the networks: forward, forward and backward, and the bytes kept for the backward pass.

    python benchmarks/networks.py                         # small versions of every network
    python benchmarks/networks.py --only ncsnpp --bf16 --threads 2 --repeats 20 --json networks.json

For the networks with FIR resampling and attention there is a second row, "restated": the same network and weights,
with these two done the way the published code describes them, written anew here: resampling by explicit zero insertion,
padding and a one-channel convolution of every channel on its own; attention by einsum over separate queries, keys and
values. The outputs are compared, so the two rows are the same function. With one thread the time is the processor's, so
that a busy machine does not count. Read ratios, not milliseconds; they hold for these sizes on this machine.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import time
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F

from models import ADM, MLP, NCSN, DiT, NCSNpp, NCSNv2, UNet, parameter_count
from models.attention import AttentionBlock
from models.resampling import FIR

SMALL = {"image_size": 32, "channels": 32, "multipliers": (1, 2, 2), "blocks": 2, "attention_resolutions": (16,)}
NETWORKS = {
    "mlp": (lambda: MLP(64), (64,)),
    "unet": (lambda: UNet(), (1, 8, 8)),
    "ddpm": (lambda: NCSNpp(residual_block="ddpm", skip_rescale=False, **SMALL), (3, 32, 32)),
    "ddpmpp": (lambda: NCSNpp(**SMALL), (3, 32, 32)),
    "ncsnpp": (
        lambda: NCSNpp(fir_kernel=(1, 3, 3, 1), progressive_input="residual", embedding="fourier", **SMALL),
        (3, 32, 32),
    ),
    "adm": (lambda: ADM(head_channels=32, **SMALL), (3, 32, 32)),
    "dit": (lambda: DiT(width=128, depth=6, heads=4), (3, 32, 32)),
    "ncsn": (lambda: NCSN(channels=32), (3, 32, 32)),
    "ncsnv2": (lambda: NCSNv2(channels=32), (3, 32, 32)),
}
RESTATED = ("ddpmpp", "ncsnpp")


def zero_insert_filter(
    x: Tensor, kernel: Tensor, *, up: int = 1, down: int = 1, pad: tuple[int, int] = (0, 0)
) -> Tensor:
    """Zeros inserted, padded, every channel convolved as an image of its own, every down-th pixel kept."""
    b, c, h, w = x.shape
    x = x.reshape(b * c, 1, h, 1, w, 1)
    x = F.pad(x, (0, up - 1, 0, 0, 0, up - 1)).reshape(b * c, 1, h * up, w * up)
    x = F.conv2d(F.pad(x, (*pad, *pad)), kernel.to(x.dtype))
    return x.reshape(b, c, *x.shape[-2:])[:, :, ::down, ::down]


def restated_attention(self: AttentionBlock, x: Tensor) -> Tensor:
    b, c, h, w = x.shape
    query, key, value = self.qkv(self.norm(x)).chunk(3, dim=1)
    weights = torch.einsum("bchw,bcij->bhwij", query, key) * c**-0.5
    weights = weights.reshape(b, h, w, h * w).softmax(-1).reshape(b, h, w, h, w)
    return (x + self.output(torch.einsum("bhwij,bcij->bchw", weights, value))) * self.scale


@contextlib.contextmanager
def restated():
    """The published code's way of resampling and attending, in this project's networks (one head, taps (1, 3, 3, 1))."""
    with (
        mock.patch.object(FIR, "down", lambda self, x: zero_insert_filter(x, self.kernel, down=2, pad=(1, 1))),
        mock.patch.object(FIR, "up", lambda self, x: zero_insert_filter(x, 4 * self.kernel, up=2, pad=(2, 1))),
        mock.patch.object(
            FIR,
            "filter",
            lambda self, x, padding, gain=1.0: zero_insert_filter(x, gain * self.kernel, pad=(padding,) * 2),
        ),
        mock.patch.object(AttentionBlock, "forward", restated_attention),
    ):
        yield


def kept_bytes(net, x, label) -> int:
    """Bytes of the tensors that autograd keeps for the backward pass, each storage once, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in net.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = net(x, label)
    del y
    return sum(kept.values())


def milliseconds(f, repeats: int, device: torch.device) -> float:
    """The median time of one call, after two to warm up."""
    clock = time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    times = []
    for i in range(repeats + 2):
        start = clock()
        f()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if i >= 2:
            times.append(clock() - start)
    return 1e3 * statistics.median(times)


def measure(net, x, label, *, repeats: int, bf16: bool) -> dict[str, float]:
    autocast = torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=bf16)

    def forward():
        with torch.no_grad(), autocast:
            net(x, label)

    def both():
        net.zero_grad(set_to_none=True)
        with autocast:
            loss = net(x, label).float().square().mean()
        loss.backward()

    with autocast:
        kept = kept_bytes(net, x, label)
    return {
        "parameters": parameter_count(net),
        "forward_ms": milliseconds(forward, repeats, x.device),
        "forward_backward_ms": milliseconds(both, repeats, x.device),
        "kept_mib": kept / 2**20,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=NETWORKS, nargs="+", default=list(NETWORKS))
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", help="write the figures to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    rows = {}
    print(f"{'network':20} {'parameters':>10} {'forward':>10} {'+backward':>10} {'kept':>10}")
    for name in arguments.only:
        make, shape = NETWORKS[name]
        torch.manual_seed(0)
        net = make().to(device)
        with torch.no_grad():
            for p in net.parameters():
                p.add_(0.02 * torch.randn_like(p))
        x = torch.rand(arguments.batch, *shape, device=device)
        label = torch.linspace(1, 9, arguments.batch, device=device)
        options = {"repeats": arguments.repeats, "bf16": arguments.bf16}
        rows[name] = measure(net, x, label, **options)
        if name in RESTATED:
            with torch.no_grad():
                ours = net(x, label)
                with restated():
                    error = float((net(x, label) - ours).abs().max() / ours.abs().max())
            if error > 1e-5:
                raise RuntimeError(
                    f"{name}: the restated path differs by {error:.1e}; the comparison would not be fair"
                )
            with restated():
                rows[f"{name}, restated"] = measure(net, x, label, **options)
        for row in (name, f"{name}, restated"):
            if row in rows:
                r = rows[row]
                print(
                    f"{row:20} {r['parameters']:10,} {r['forward_ms']:7.1f} ms {r['forward_backward_ms']:7.1f} ms "
                    f"{r['kept_mib']:6.1f} MiB"
                )
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump({"options": vars(arguments), "torch": torch.__version__, "networks": rows}, file, indent=2)


if __name__ == "__main__":
    main()
