"""The configuration that the experiments share; each script changes what is its own."""

from __future__ import annotations

from ml_collections import ConfigDict


def base_config() -> ConfigDict:
    """Everything but the SDE, for scikit-learn's digits on two CPU cores. Tuples, not lists: flags can override those."""
    return ConfigDict(
        {
            "name": "",
            "seed": 0,
            "device": "auto",
            # torch's threads on a CPU; 0 leaves them. For this small network one is the safe choice: two make 16 to 20
            # training steps a second on two free cores but 4.4 where another process runs, one makes 12.6 and 12.3
            "threads": 1,
            # dataset: which one of torchvision's. size, channels: of pictures that are decoded. cache: a folder to keep them
            # in, decoded. 0 and "" leave these to the data set
            "data": {
                "name": "digits",
                "root": "",
                "dataset": "",
                "size": 0,
                "channels": 0,
                "cache": "",
                "low": -1.0,
                "high": 1.0,
            },
            "model": {
                "name": "auto",
                "channels": 32,
                "multipliers": (1, 1),
                "blocks": 1,
                "dropout": 0.0,
                "fourier_features": (1.0, 2.0),
                "class_conditional": False,
                "parametrization": "preconditioned",
                "conditioning": "log_snr",
                "mlp_width": 128,
                "mlp_depth": 4,
            },
            "training": {
                # "train", or "fit": the same without the validation images
                "split": "train",
                # three and a half minutes on a slow core (7.6 steps a second), two on a fast one
                "steps": 1500,
                "batch_size": 128,
                "learning_rate": 2e-3,
                "warmup": 100,
                "schedule": "cosine",
                "clip": 1.0,
                "ema": (0.999,),
                "flip": False,
                "betas": (0.9, 0.99),
                "label_dropout": 0.1,
                "precision": "fp32",
                "weighting": "simple",
                "times": "log_normal",
                "log_normal_mean": -1.5,
                "log_normal_std": 2.2,
                "nonfinite": "stop",
                "max_skips": 10,
                "parallel": "ddp",
                "compile": False,
                "log_every": 50,
                # a picture of samples, and the loss and the bound of so many validation images (0: none), which costs about
                # eight steps (batches of 128) at each evaluation, 2 % of the whole
                "eval_every": 500,
                "validation": 128,
                "checkpoint_every": 1000,
                "keep": 2,
            },
            "sampling": {"sampler": "pc", "steps": 250, "n": 64, "second": "dpm_solver", "second_steps": 20},
            "likelihood": {
                "split": "test",
                "solver": "fast",
                "steps": 128,
                "probes": 2,
                "draws": 2,
                "batch_size": 100,
                "limit": 0,
            },
            "baselines": True,
        }
    )
