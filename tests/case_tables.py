"""Tables of cases as `srlib.study.grid.cases` returns them, made up, for the tests of statistics and their figures."""

import numpy as np
import pandas as pd

CLASSES = ("anterior", "posterior")


def cases(
    shifts=None,
    folds=(0,),
    seeds=(0, 1, 2),
    n=20,
    seed_sd=0.002,
    noise_sd=0.01,
    minutes=np.nan,
    random=0,
):
    """Dice 0.88 with a spread of 0.03 between cases, to which a system adds its shift.

    Args:
        shifts: system -> what it adds to the Dice of each case.
        folds: held out, `n` other cases each.
        seeds: of each fold's runs.
        n: cases of a fold.
        seed_sd: standard deviation between trainings, the same for all cases of one.
        noise_sd: standard deviation of one case between trainings.
        minutes: the budget, NaN for equal steps.
        random: seed of these numbers.
    """
    random = np.random.default_rng(random)
    rows = []
    for fold in folds:
        quality = random.normal(0.88, 0.03, (n, len(CLASSES)))
        volume = random.uniform(1, 3, (n, len(CLASSES)))
        for system, shift in (shifts or {"segresmamba": 0.0, "none": -0.01}).items():
            for seed in seeds:
                training = shift + random.normal(0, seed_sd)
                dice = quality + training + random.normal(0, noise_sd, quality.shape)
                run = {"run": f"{system}-{fold}-{seed}", "system": system, "fold": fold}
                run |= {"title": system.title(), "dataset": "made up", "device": "no device"}
                run |= {"seed": seed, "steps": 1500, "minutes": minutes}
                for case, k in np.ndindex(*quality.shape):
                    value = float(dice[case, k].clip(0, 1))
                    scores = {"dice": value, "nsd": value**0.5, "hd95": 20 * (1 - value)}
                    scores["sensitivity"] = value
                    volumes = {"volume_ref_ml": volume[case, k]}
                    volumes["volume_pred_ml"] = volume[case, k] * (2 - value)
                    name = {"case": f"case {fold}-{case}", "class": CLASSES[k]}
                    rows.append(run | name | scores | volumes)
    return pd.DataFrame(rows)
