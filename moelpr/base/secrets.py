"""Texts that look like a secret, or like a folder of one machine: kept out of messages, model cards and uploads.

detect-secrets, the library for this, knows neither Hugging Face's tokens nor signed URLs, and needs five more packages.
"""

import re
from pathlib import PurePath

SECRET = re.compile(
    r"""\b(?:hf|api_org)_[A-Za-z0-9]{30,} | \bgithub_pat_\w{22,} | \bsk-[\w-]{32,} | \b(?:AKIA|ASIA)[A-Z0-9]{16}\b
    | \bgh[pousr]_[A-Za-z0-9]{36,} | \bgl(?:pat|rt|dt|cbt|ptt)-[\w-]{20,} | \bxox[abeoprs]-[\w-]{10,} | \bAIza[\w-]{35}
    | \bpypi-[\w-]{60,} | \bwandb_v1_\w{20,} | \beyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]*
    | -----BEGIN[ A-Z]*[ ]PRIVATE[ ]KEY-----
    | (?<=://)[^\s/:@]+(?::(?!\d+(?:/|$))[^\s@]+)?(?=@)  # a login, whose password may have slashes, unlike a port
    | (?i:(?<=[?&])(?:X-(?:Amz|Goog)-(?:Signature|Credential|Security-Token)|sig|signature|access_token|token)=)
      [^\s&"']+
    | (?i:(?:secret_access_key|secret_?key|api_?key|auth_?token|access_?token|passw(?:or)?d)["']?\s*[=:]\s*["']?)
      [A-Za-z0-9/+_-]{20,}""",
    re.VERBOSE,
)
_ROOTS = """beegfs|bb|ceph|cluster|data|eagle|fsx|global|gpfs|home|jobs|lustre|media|mnt|net|nfs|opt|p|pfs|private|proj
|projects?|root|scratch|shared|srv|storage|tmp|Users|users|var|vol|work|workspace""".replace("\n", "")
LOCAL_PATH = re.compile(rf"(?<![\w.:/~])/(?:{_ROOTS})\d*(?:/[\w.+-]+)+|\b[A-Za-z]:[\\/]+Users[\\/]+[\w.+\\/-]+")


def without_secrets(text: str) -> str:
    """The text with … in the place of secrets."""
    return SECRET.sub("…", text)


def without_paths(text: str) -> str:
    """The text with names of files in the place of their paths on this machine."""
    return LOCAL_PATH.sub(lambda found: PurePath(found[0].replace("\\", "/")).name, text)
