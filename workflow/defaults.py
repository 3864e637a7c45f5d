"""The configuration that the systems share; each changes what is its own. Every value has the digits and two CPU cores in mind.

A section names a class and shows all its options (`workflow.sections`). The values beside sections are the workflow's own;
`HELP` is their help. Tuples, not lists: flags can override those.
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

HELP = {
    "system": "name of the system, written into config.json",
    "seed": "seed of the weights, the training, the samples and the likelihood",
    "device": "auto (the GPU where there is one), cpu, cuda, cuda:N or mps",
    "threads": "number of threads of torch on a CPU, at most OMP_NUM_THREADS where that is set; 0 for torch's own number",
    "baselines": "whether to score simple densities beside the model",
    "data.low": "number that grey level 0 becomes in model units",
    "data.high": "upper end of the highest grey level in model units",
    "data.scaling": "how data without grey levels are standardised: joint, columns or auto (docs/data.md)",
    "data.drop_duplicates": "whether to leave out training samples that are also in the test split",
    "model.grey_level_features": "sine features of the input: how often each turns within a grey level; () for none",
    "model.class_conditional": "whether the network is told the class",
    "training.batch_size": "samples per update, over all processes and parts; None for 128 images or 512 points",
    "training.split": "train, or fit: train without the validation samples",
    "training.validation": "number of held-out samples whose loss and bound each evaluation measures; 0 for none",
    "bound.draws": "number of draws of each image's variational bound",
    "sampling.n": "number of samples to draw; None for 64 images or 2,000 points",
}
"""What `--help` says of the values that no class has."""


def base_config(system: str) -> ConfigDict:
    """Everything but the SDE, which is the system's own.

    Args:
        system: the name that config.json will hold.
    """
    data_section = section(data.DATASETS, "digits")
    data_section.update({"low": -1.0, "high": 1.0, "scaling": "auto", "drop_duplicates": False})

    model = section(models.NETWORKS, "auto", channels=32, multipliers=(1, 1), blocks=1, width=128, depth=4)
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
    # the points' (the swiss roll's negative log-density after 1,500 steps: 2.41 with 128, 1.44 with 512 where
    # the truth has 1.42 bits/dim)
    optimization.batch_size = FieldReference(None, field_type=object)
    optimization.split = "train"
    # 128 cost about eight steps
    optimization.validation = 128
    optimization.objective = section(training.OBJECTIVES, "dsm", times={"name": "log_normal", "mean": -1.5, "std": 2.2})

    return ConfigDict(
        {
            "system": system,
            "seed": 0,
            "device": "auto",
            # for this small network one is the safe choice: two make 16 to 20 training steps a second on two free cores
            # but 4.4 where another process runs, one makes 12.6 and 12.3
            "threads": 1,
            "data": data_section,
            "model": model,
            "training": optimization,
            "sampling": {
                "sampler": section(samplers.SAMPLERS, "pc", steps=250),
                "second": section(samplers.SAMPLERS, "dpm_solver", steps=20),
                "n": FieldReference(None, field_type=object),
            },
            # bits/dim: 297 digits leave a standard error of 0.013, beside which this is little
            "likelihood": fields_section(Protocol, leave=("seed",), tolerance=4e-3),
            "baselines": True,
        }
    )
