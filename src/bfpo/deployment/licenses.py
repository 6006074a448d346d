"""Licenses of models and data: what they ask of who publishes a model. A summary, which replaces no license."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class License:
    """What a license asks of a published model.

    Args:
        title: Its name.
        duties: What a publisher must do, in words.
        is_passed_on: Whether a model that is made from another keeps this license.
        is_commercial: Whether it allows commercial use.
        name_prefix: What the name of the published model must begin with.
        notice: Line that a file `NOTICE` must have.
        credit: Words that the model card must show.
    """

    title: str
    duties: str = "keep its copyright notice and its text"
    is_passed_on: bool = False
    is_commercial: bool = True
    name_prefix: str = ""
    notice: str = ""
    credit: str = ""


def _llama(version: str) -> License:
    # Section 1.b, i and iii, of the agreements for Llama 3.1 to 4: models/*/LICENSE of meta-llama/llama-models.
    return License(
        f"Llama {version} Community License",
        'pass on a copy of the agreement, show "Built with Llama", begin the name with Llama, and follow its '
        "acceptable use policy",
        is_passed_on=True,
        name_prefix="Llama",
        notice=f"Llama {version} is licensed under the Llama {version} Community License, "
        "Copyright © Meta Platforms, Inc. All Rights Reserved.",
        credit="Built with Llama",
    )


_NON_COMMERCIAL = "name the source; no commercial use"

LICENSES: Mapping[str, License] = {
    # https://choosealicense.com, by the hub's identifiers (huggingface.co/docs/hub/repositories-licenses).
    "apache-2.0": License("Apache License 2.0", "keep its text and notices, and say what was changed"),
    "mit": License("MIT License"),
    "bsd-3-clause": License("BSD 3-Clause License"),
    "cc0-1.0": License("Creative Commons Zero", "none"),
    "odc-by": License("Open Data Commons Attribution License", "name the source"),
    # https://creativecommons.org/licenses
    "cc-by-4.0": License("CC BY 4.0", "name the source, and say what was changed"),
    "cc-by-sa-4.0": License("CC BY-SA 4.0", "name the source; adaptations have the same license"),
    "cc-by-nc-4.0": License("CC BY-NC 4.0", _NON_COMMERCIAL, is_commercial=False),
    "cc-by-nc-sa-4.0": License(
        "CC BY-NC-SA 4.0", f"{_NON_COMMERCIAL}; adaptations have the same license", is_commercial=False
    ),
    # Section 1.b of https://llama.meta.com/llama3/license
    "llama3": License(
        "Meta Llama 3 Community License",
        'pass on a copy of the agreement, show "Built with Meta Llama 3", begin the name with Llama 3, and follow '
        "its acceptable use policy",
        is_passed_on=True,
        name_prefix="Llama 3",
        notice="Meta Llama 3 is licensed under the Meta Llama 3 Community License, "
        "Copyright © Meta Platforms, Inc. All Rights Reserved.",
        credit="Built with Meta Llama 3",
    ),
    # Section 1.b of https://ai.meta.com/llama/license
    "llama2": License(
        "Llama 2 Community License",
        "pass on a copy of the agreement, and follow its acceptable use policy",
        is_passed_on=True,
        notice="Llama 2 is licensed under the LLAMA 2 Community License, "
        "Copyright (c) Meta Platforms, Inc. All Rights Reserved.",
    ),
    "llama3.1": _llama("3.1"),
    "llama3.2": _llama("3.2"),
    "llama3.3": _llama("3.3"),
    "llama4": _llama("4"),
    # Section 3.1 of https://ai.google.dev/gemma/terms; Gemma 4 is under Apache-2.0.
    "gemma": License(
        "Gemma Terms of Use",
        "pass on a copy of the terms with their use restrictions (section 3.2), and say that the files were changed",
        is_passed_on=True,
        notice="Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms",
        credit="A model derivative of Gemma, which was changed by further training. Its use is restricted by section "
        "3.2 of the Gemma Terms of Use and by the Gemma Prohibited Use Policy "
        "(https://ai.google.dev/gemma/prohibited_use_policy).",
    ),
}
"""Identifier on the hub → license."""

DATA_LICENSES: Mapping[str, str] = {
    # The cards of these data sets on the hub.
    "PKU-Alignment/PKU-SafeRLHF": "cc-by-nc-4.0",
    "PKU-Alignment/PKU-SafeRLHF-30K": "cc-by-nc-4.0",
    "PKU-Alignment/BeaverTails": "cc-by-nc-4.0",
    "HuggingFaceH4/ultrafeedback_binarized": "mit",
    "openbmb/UltraFeedback": "mit",
}
"""Data set on the hub → license, for sets whose recipe names none."""


def describe(identifier: str) -> str:
    """Return the duties of a license in words."""
    license = LICENSES.get(normalize(identifier))
    if license is None:
        return "not known to bfpo: read its text"
    return license.duties if license.is_commercial else f"**non-commercial**; {license.duties}"


def normalize(name: str) -> str:
    """Return the hub's identifier of a license that is spelled in another way, such as `CC-BY-NC-4.0`."""
    lower = name.strip().lower()
    by_title = {license.title.lower(): identifier for identifier, license in LICENSES.items()}
    return by_title.get(lower, lower)
