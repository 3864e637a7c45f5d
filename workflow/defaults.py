"""The configuration that the systems share; each changes what is its own. Every value has the digits and two CPU cores in mind.

A section names a class and shows all its options (`workflow.sections`). The values beside sections are the workflow's own.
Tuples, not lists: flags can override those.
"""

from __future__ import annotations

from ml_collections import ConfigDict, FieldReference

import data
import models
import samplers
import training
from training import TrainingOptions
from workflow.protocol import Protocol
from workflow.sections import fields_section, section


def base_config(system: str) -> ConfigDict:
    """Everything but the SDE, which is the system's own.

    Args:
        system: the name that config.json will hold.
    """
    data_section = section(data.DATASETS, "digits")
    # grey levels become numbers from low to high; other data are standardised, jointly or by columns
    # drop_duplicates leaves training samples out that are also in the test split
    data_section.update({"low": -1.0, "high": 1.0, "scaling": "auto", "drop_duplicates": False})

    model = section(models.NETWORKS, "auto", channels=32, multipliers=(1, 1), blocks=1, width=128, depth=4)
    # sine features of the input that turn once, twice, ... in a grey level
    model.grey_level_features = (1.0, 2.0)
    model.class_conditional = False
    model.parametrization = section(models.PARAMETRIZATIONS, "preconditioned")
    model.conditioning = section(models.CONDITIONINGS, "log_snr")

    optimization = fields_section(
        TrainingOptions,
        leave=("seed", "progress"),
        # three and a half minutes on a slow core (7.6 steps a second), two on a fast one
        steps=1500,
        learning_rate=2e-3,
        warmup=100,
        schedule="cosine",
        betas=(0.9, 0.99),
        ema=(0.999,),
        label_dropout=0.1,
        log_every=50,
        eval_every=500,
        checkpoint_every=1000,
        keep=2,
    )
    # None: 128 images, 512 points (the swiss roll's negative log-density after 1,500 steps: 2.41 with 128, 1.44 with 512 where
    # the truth has 1.42 bits/dim)
    optimization.batch_size = FieldReference(None, field_type=object)
    # "train", or "fit": the same without the validation images
    optimization.split = "train"
    # images whose loss and bound are measured at each evaluation (0: none); 128 cost about eight steps
    optimization.validation = 128
    optimization.objective = section(training.OBJECTIVES, "dsm", times={"name": "log_normal", "mean": -1.5, "std": 2.2})

    return ConfigDict(
        {
            "system": system,
            "seed": 0,
            # auto: the GPU where there is one
            "device": "auto",
            # torch's threads on a CPU; 0 leaves them. For this small network one is the safe choice: two make 16 to 20
            # training steps a second on two free cores but 4.4 where another process runs, one makes 12.6 and 12.3
            "threads": 1,
            "data": data_section,
            "model": model,
            "training": optimization,
            "sampling": {
                "sampler": section(samplers.SAMPLERS, "pc", steps=250),
                "second": section(samplers.SAMPLERS, "dpm_solver", steps=20),
                # how many; None: 64 images, 2,000 points
                "n": FieldReference(None, field_type=object),
            },
            "likelihood": fields_section(Protocol, leave=("seed",)),
            # simple densities beside the model's bits/dim
            "baselines": True,
        }
    )
