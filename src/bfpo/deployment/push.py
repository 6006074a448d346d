"""The work of `bfpo push`: a checkpoint in a repository of a hub, with its licenses and without anything private."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx2 as httpx
from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from bfpo.config.loading import parse_yaml
from bfpo.core.files import parse_json, write_text
from bfpo.core.terminal import say, show_table, warn
from bfpo.deployment.licenses import DATA_LICENSES, LICENSES, describe, normalize
from bfpo.deployment.push_card import CardFacts, DataSource, make_card, read_sources
from bfpo.deployment.upload_files import UploadFile, clean_text, private_names, select_files
from bfpo.errors import DataError, DeploymentError, RecipeError

Ask = Callable[[str], str]
"""Function that asks a question on the terminal, and returns the answer."""


@dataclass(frozen=True, slots=True)
class PushOptions:
    """What the command line says about an upload.

    Args:
        repo_id: Repository, `owner/name`.
        private: Whether it is private.
        license: License of the model; None to find or ask it.
        base_model: Hub id of the base model; None if the checkpoint names one.
        base_license: License of the base model; None to find or ask it.
        data_licenses: Name of a set of data → its license.
        endpoint: Address of the hub; None is huggingface_hub's.
    """

    repo_id: str
    private: bool = False
    license: str | None = None
    base_model: str | None = None
    base_license: str | None = None
    data_licenses: Mapping[str, str] | None = None
    endpoint: str | None = None


def push(
    folder: Path, options: PushOptions, *, evaluation: str | None, ask: Ask | None, confirm: Callable[[], bool]
) -> None:
    """Upload a checkpoint to a repository of a hub.

    The same call resumes an interrupted upload, as huggingface_hub does: files that are there aren't sent twice.

    Args:
        folder: Folder of the checkpoint.
        options: What the command line says.
        evaluation: Section of the model card on an evaluation; None for none.
        ask: Function that asks for what is missing; None if nobody can be asked.
        confirm: Function that asks, after the list of files was shown, whether they are uploaded.

    Raises:
        RecipeError: If a license or a name is missing or not allowed.
        ModelError: If the folder contains no model.
        DataError: If a file contains a secret or is malformed.
        DeploymentError: If the hub can't be reached, or refuses the upload.
    """
    if options.repo_id.count("/") != 1:
        raise RecipeError(f"REPO_ID is '{options.repo_id}'; expected owner/name")
    _check_id("REPO_ID", options.repo_id)
    private = private_names(options.repo_id)
    files, left_out = select_files(folder, private)
    if evaluation is not None:
        evaluation, _ = clean_text(evaluation, private, where="the evaluation's section")
    token = get_token()
    if token is None:
        raise RecipeError("no token of the hub: log in by `hf auth login`, or set HF_TOKEN")
    api = HfApi(endpoint=options.endpoint, token=token)
    facts = _find_facts(folder, options, api, ask)
    _check_duties(facts, {file.path.name for file in files})
    files = _with_card(files, folder, facts, evaluation)
    _show(facts, files, left_out, options.private)
    if not confirm():
        say("nothing was uploaded")
        return
    with TemporaryDirectory(prefix="bfpo-push-") as staging:
        _stage(files, Path(staging))
        url = _upload(api, options, Path(staging))
    say(f"uploaded to {url}")


def _check_id(option: str, repo_id: str) -> None:
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise RecipeError(f"{option} is no name of a repository: {str(error).rstrip('.')}") from None


def _find_facts(folder: Path, options: PushOptions, api: HfApi, ask: Ask | None) -> CardFacts:
    adapter, manifest = _read_json(folder / "adapter_config.json"), _read_json(folder / "data_manifest.json")
    base = options.base_model or _base_of(folder, adapter)
    if base and (base.count("/") > 1 or base.startswith((".", "/", "~")) or Path(base).exists()):
        # Others couldn't load the adapter, and the card would name a folder of this machine.
        base = _find(None, f"the base model is the folder '{base}'; its id on the hub", "--base-model", ask)
    base_license = ""
    if base:
        _check_id("--base-model", base)
        known = options.base_license or _license_on_hub(api, base)
        base_license = normalize(_find(known, f"license of the base model {base}", "--base-license", ask))
    elif options.base_license is not None:
        raise RecipeError(f"--base-license is {options.base_license}, but the model has no base; add --base-model")
    sources, labels = read_sources(manifest)
    given = dict(options.data_licenses or {})
    if unknown := sorted(given.keys() - {source.name for source in sources}):
        names = ", ".join(source.name for source in sources) or "none"
        raise RecipeError(f"--data-license names '{unknown[0]}'; the sets in data_manifest.json are {names}")
    sources = [_with_license(source, given, ask) for source in sources]
    kept = [name for name in (base_license,) if name in LICENSES and LICENSES[name].is_passed_on]
    license = options.license or (kept[0] if kept else None)
    if license is not None and kept and normalize(license) != kept[0]:
        raise RecipeError(f"--license is {license}, but a model made from {base} keeps its license, {kept[0]}")
    license = normalize(_find(license, "license of the uploaded model", "--license", ask))
    return CardFacts(options.repo_id, license, base, base_license, bool(adapter), sources, labels)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = parse_json(path.read_bytes())
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error})") from None
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected a JSON object")
    return content


def _base_of(folder: Path, adapter: Mapping[str, Any]) -> str:
    """Return the base model that a checkpoint names; "" for one that was trained from a new model."""
    if adapter:
        return str(adapter.get("base_model_name_or_path") or "")
    recipe_file = folder / "recipe.resolved.yaml"
    if not recipe_file.is_file():
        return ""
    recipe = parse_yaml(recipe_file.read_text(encoding="utf-8"), str(recipe_file))
    model = recipe.get("model") if isinstance(recipe, dict) else None
    return str(model.get("path") or "") if isinstance(model, dict) else ""


def _find(known: str | None, what: str, flag: str, ask: Ask | None) -> str:
    """Return what is known, or the answer of a person.

    Raises:
        RecipeError: If nobody can be asked.
    """
    if known:
        return known
    if ask is None:
        raise RecipeError(f"the {what.removeprefix('the ')} isn't known; give it by {flag}")
    answer = ask(what).strip()
    if not answer:
        raise RecipeError(f"no {what.removeprefix('the ')}; give it by {flag}")
    return answer


def _with_license(source: DataSource, given: Mapping[str, str], ask: Ask | None) -> DataSource:
    known = given.get(source.name) or source.license or DATA_LICENSES.get(source.hub_id)
    flag = f"--data-license {source.name}=ID"
    return replace(source, license=normalize(_find(known, f"license of the data {source.name}", flag, ask)))


def _license_on_hub(api: HfApi, base: str) -> str | None:
    """Return the license that the card of a base model names; None if it can't be read."""
    try:
        data = api.model_info(base).card_data
    except (HfHubHTTPError, httpx.HTTPError, OfflineModeIsEnabled, ValueError):
        return None
    if data is None:
        return None
    name = data.license_name if data.license == "other" else data.license
    return name if isinstance(name, str) else None


def _check_duties(facts: CardFacts, names: set[str]) -> None:
    """Check what can be checked of the duties of a license that is passed on.

    Raises:
        RecipeError: If one isn't met.
    """
    license = LICENSES.get(facts.base_license)
    if license is None or not license.is_passed_on:
        return
    name = facts.repo_id.partition("/")[2]
    if not name.lower().replace("-", " ").replace("_", " ").startswith(license.name_prefix.lower()):
        raise RecipeError(
            f"REPO_ID: the {license.title} of {facts.base} asks for a name that begins with "
            f"{license.name_prefix.replace(' ', '-')}, not '{name}'"
        )
    if not any(name.startswith("LICENSE") for name in names):
        raise RecipeError(
            f"the {license.title} of {facts.base} asks for a copy of it: put its text into the folder as LICENSE"
        )


def _with_card(files: list[UploadFile], folder: Path, facts: CardFacts, evaluation: str | None) -> list[UploadFile]:
    """Return the files with the card of the repository, the hub id of the base, and the notice of its license."""
    by_name = {file.path.name: file for file in files}
    card = by_name.get("README.md")
    text = "" if card is None else card.path.read_text(encoding="utf-8") if card.text is None else card.text
    written = _read_card_path(folder)
    content = make_card(text, facts, local_name=written, evaluation=evaluation)
    by_name["README.md"] = UploadFile(folder / "README.md", content, () if card is None else card.replaced)
    if facts.is_adapter:
        file = by_name["adapter_config.json"]
        config = json.loads(file.text or file.path.read_text(encoding="utf-8"))
        if config.get("base_model_name_or_path") != facts.base:
            config["base_model_name_or_path"] = facts.base
            by_name["adapter_config.json"] = replace(
                file, text=json.dumps(config, indent=2) + "\n", replaced=(f"the base model by {facts.base}",)
            )
    license = LICENSES.get(facts.base_license)
    if license is not None and license.notice and not any(name.startswith("NOTICE") for name in by_name):
        by_name["NOTICE"] = UploadFile(folder / "NOTICE", license.notice + "\n")
    return [by_name[name] for name in sorted(by_name)]


def _read_card_path(folder: Path) -> str:
    """Return the path by which the run's card loads the model, without its folders if it is absolute."""
    run = _read_json(folder / "run.json")
    recipe = run.get("recipe")
    trainer = recipe.get("trainer") if isinstance(recipe, dict) else None
    out = str(trainer.get("output_dir") or folder) if isinstance(trainer, dict) else str(folder)
    return Path(out).name if Path(out).is_absolute() else out


def _show(facts: CardFacts, files: list[UploadFile], left_out: list[str], private: bool) -> None:
    rows = [(file.path.name, f"{file.size:,}", "; ".join(file.replaced)) for file in files]
    visibility = "private" if private else "public"
    show_table(f"Files for {facts.repo_id} ({visibility})", ("file", "bytes", "replaced"), rows)
    if left_out:
        say(f"not uploaded: {', '.join(left_out)}")
    licenses = [("this model", facts.license), *([(facts.base, facts.base_license)] if facts.base else [])]
    licenses += [(source.name, source.license) for source in facts.sources]
    show_table("Licenses", ("of", "license", "asks to"), [(what, name, describe(name)) for what, name in licenses])
    own = LICENSES.get(facts.license)
    closed = [
        source.name for source in facts.sources if (of := LICENSES.get(source.license)) and not of.is_commercial
    ]
    if closed and (own is None or own.is_commercial):
        warn(
            f"{', '.join(closed)}: data for non-commercial use, in a model under {facts.license}; check that you may "
            "publish it so"
        )


def _stage(files: list[UploadFile], staging: Path) -> None:
    for file in files:
        if file.text is None:
            (staging / file.path.name).symlink_to(file.path.resolve())
        else:
            write_text(staging / file.path.name, file.text)


def _upload(api: HfApi, options: PushOptions, staging: Path) -> str:
    """Create the repository if it isn't there, upload the files, and return its address."""
    repo_id = options.repo_id
    try:
        url = api.create_repo(repo_id, private=options.private or None, exist_ok=True)
        # For one that exists, `private` had no effect.
        if options.private and not api.model_info(repo_id).private:
            raise RecipeError(f"{repo_id} exists and is public; make it private on the hub, or leave out --private")
        api.upload_folder(repo_id=repo_id, folder_path=staging, commit_message="Upload a model with bfpo push")
    except (HfHubHTTPError, httpx.HTTPError, OfflineModeIsEnabled, OSError, RuntimeError) as error:
        raise DeploymentError(_describe(error, api.endpoint, repo_id)) from error
    return str(url)


def _describe(error: BaseException, endpoint: str, repo_id: str) -> str:
    """Return an error of an upload in words; huggingface_hub wraps those of a file in a `RuntimeError`."""
    again = "run the same command again to go on with the upload"
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        reason = error.server_message or error.response.reason_phrase
        hint = again if status >= 500 else ""
        if status == 401:
            hint = "the hub doesn't accept the token: log in by `hf auth login`, or set HF_TOKEN"
        elif status == 403:
            hint = f"the token may not write to {repo_id}: it needs that permission, also in the organization"
        return f"the hub refuses the upload: HTTP {status} {reason}" + (f"; {hint}" if hint else "")
    if isinstance(error, httpx.HTTPError | OfflineModeIsEnabled):
        reason = str(error).partition("\n")[0] or type(error).__name__
        return f"{endpoint} can't be reached ({reason}); {again}"
    if error.__cause__ is not None:
        return _describe(error.__cause__, endpoint, repo_id)
    return f"the upload failed: {type(error).__name__}: {str(error).partition(chr(10))[0]}; {again}"
