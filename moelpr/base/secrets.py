"""Texts that look like a secret, or like a folder of one machine: kept out of messages, model cards and uploads.

detect-secrets, the library for this, knows neither Hugging Face's tokens nor signed URLs, and needs five more packages.
"""

import re
from pathlib import PurePath

_TOKENS = (
    r"\b(?:hf|api_org)_[A-Za-z0-9]{30,}",
    r"\bsk-[A-Za-z0-9_-]{32,}",
    r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b",
    r"\bgh[pousr]_[A-Za-z0-9]{36,}",
    r"\bgithub_pat_\w{22,}",
    r"\bgl(?:pat|rt|dt|cbt|ptt)-[\w-]{20,}",
    r"\bxox[abeoprs]-[\w-]{10,}",
    r"\bAIza[\w-]{35}",
    r"\bpypi-[\w-]{60,}",
    r"\bwandb_v1_\w{20,}",
    r"\beyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]*",
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    # A login in a URL, whose password may have slashes, unlike a port.
    r"(?<=://)[^\s/:@]+:(?!\d+(?:/|$))[^\s@]+(?=@)",
    r"(?i:(?<=[?&])(?:X-Amz-(?:Signature|Credential|Security-Token)|X-Goog-Signature|sig|signature|access_token|token)=)"
    r"[^\s&\"']+",
    r"(?i:(?:secret_access_key|secret_?key|api_?key|auth_?token|access_?token|passw(?:or)?d)[\"']?\s*[=:]\s*[\"']?)"
    r"[A-Za-z0-9/+_-]{20,}",
)
_SECRET = re.compile("|".join(_TOKENS))
_ROOTS = "beegfs bb ceph cluster data eagle fsx global gpfs home jobs lustre media mnt net nfs opt p pfs private proj"
_ROOTS += " project projects root scratch shared srv storage tmp Users users var vol work workspace"
_LOCAL_PATH = re.compile(
    rf"(?<![\w.:/~])/(?:{'|'.join(_ROOTS.split())})\d*(?:/[\w.+-]+)+|\b[A-Za-z]:[\\/]+Users[\\/]+[\w.+\\/-]+"
)


def secret_in(text: str) -> str:
    """The first thing in a text that looks like a secret; "" if nothing does."""
    return found[0] if (found := _SECRET.search(text)) else ""


def without_secrets(text: str) -> str:
    """The text with … in the place of secrets."""
    return _SECRET.sub("…", text)


def path_in(text: str) -> str:
    """The first folder or file of this machine that a text names; "" if it names none."""
    return found[0] if (found := _LOCAL_PATH.search(text)) else ""


def without_paths(text: str) -> str:
    """The text with names of files in the place of their paths on this machine."""
    return _LOCAL_PATH.sub(lambda found: PurePath(found[0].replace("\\", "/")).name, text)
