"""Settings to reach an S3 bucket with obstore, from the environment and the two files in ``~/.aws``.

The lookup is that of the AWS command line, except for keys that need a login or another request first. Single sign-on,
roles and credential programs are refused, with the command that puts their keys into the environment.
"""

from __future__ import annotations

import configparser
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from xml.sax.saxutils import unescape

from latentprep.errors import SystemFault

_ADDRESS = re.compile(r"https?://([\w.-]+|\[[\da-f:.]+\])(:\d{1,5})?(/[\w./~%+-]*)?", re.ASCII | re.IGNORECASE)
_PROBE = 1.0  # seconds to wait for the machine's metadata service, which is on the same machine
_ELSEWHERE = ("sso_session", "sso_start_url", "role_arn", "credential_process", "credential_source")
_CHAIN = (  # in a container or a cluster: obstore uses these by itself
    "AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "AWS_CONTAINER_CREDENTIALS_FULL_URI",
)  # fmt: skip
_PASSING = ("RequestTimeout", "SlowDown", "InternalError", "OperationAborted", "ConditionalRequestConflict")
KEYS = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE to a profile in ~/.aws/credentials"
_WAYS_OUT = {
    "ExpiredToken": "get new keys, and set AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN to them",
    "InvalidToken": "set AWS_SESSION_TOKEN to the token that belongs to these keys, or unset it for long-term keys",
    "InvalidAccessKeyId": "check AWS_ACCESS_KEY_ID; if the keys are not for AWS, set AWS_ENDPOINT_URL to their service",
    "SignatureDoesNotMatch": "check AWS_SECRET_ACCESS_KEY: it does not belong to AWS_ACCESS_KEY_ID",
    "AccessDenied": f"{KEYS}, of a user who may do this; for a public bucket, set AWS_SKIP_SIGNATURE=true",
    "NoSuchBucket": "check the bucket's name; if it is not on AWS, set AWS_ENDPOINT_URL to its service",
    "RequestTimeTooSkewed": "correct this machine's clock",
}
_MOVED = "<Code>PermanentRedirect</Code><Message>the bucket is in another region</Message>"
_REGION = ("PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException")


def s3_settings(environ: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Settings of obstore's ``S3Store``, as far as they are known: endpoint, region, keys or ``skip_signature``.

    Keys come from the environment, else from the profile that ``AWS_PROFILE`` names, else from the profile ``default``,
    else from the role of a container or of this machine. If there are none, requests are anonymous.

    Raises `SystemFault` for an endpoint that is not an address, for a profile that does not exist or has no keys that
    can be read, and for a damaged file.
    """
    env = os.environ if environ is None else environ
    profile = _profile(env)
    settings: dict[str, Any] = {}
    endpoint = _first(env, "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT") or profile.get("endpoint_url", "")
    if endpoint:
        if not _ADDRESS.fullmatch(endpoint):  # obstore ends in a panic
            raise SystemFault(
                f"{endpoint} is no address of an S3 service",
                "set AWS_ENDPOINT_URL to one, as https://HOST or http://HOST:9000",
            )
        settings["endpoint"] = endpoint.rstrip("/")
    if region := _first(env, "AWS_REGION", "AWS_DEFAULT_REGION") or profile.get("region", ""):
        settings["region"] = region
    if _is_true(env.get("AWS_SKIP_SIGNATURE")) or _is_true(env.get("AWS_NO_SIGN_REQUEST")):
        return {**settings, "skip_signature": True}
    names = {"aws_access_key_id": "access_key_id", "aws_secret_access_key": "secret_access_key"}
    here = {short: env[name.upper()] for name, short in names.items() if env.get(name.upper())}
    token = env.get("AWS_SESSION_TOKEN", "")
    if not here:
        here = {short: profile[name] for name, short in names.items() if profile.get(name)}
        token = profile.get("aws_session_token", "")
    if len(here) == 1:
        raise SystemFault(f"only one of the two keys for S3 is set, {next(iter(here))}", KEYS)
    if here:
        return {**settings, **here, **({"session_token": token} if token else {})}
    if any(env.get(name) for name in _CHAIN):
        return settings
    if elsewhere := [name for name in _ELSEWHERE if name in profile]:
        name = env.get("AWS_PROFILE") or "default"
        raise SystemFault(
            f"AWS profile '{name}' has no keys but {elsewhere[0]}, which is not supported",
            f'run: eval "$(aws configure export-credentials --profile {name} --format env)"',
        )
    if env.get("AWS_PROFILE"):
        raise SystemFault(f"AWS profile '{env['AWS_PROFILE']}' has no keys", "put its keys into ~/.aws/credentials")
    return settings if _has_role(env) else {**settings, "skip_signature": True}


def refusal(answer: str, where: str, anonymous: bool = False) -> SystemFault | None:
    """The error for a request that a service refused, from the XML in obstore's error text. None if it was not
    refused, or if trying again may help."""
    reason = re.search(r"<Code>([^<]+)</Code>", answer)
    if reason is None or reason[1] in _PASSING or reason[1] == "NoSuchKey":
        return None
    code, message = reason[1], re.search(r"<Message>([^<]*)</Message>", answer)
    region = re.search(r"<Region>([\w-]+)</Region>", answer)
    way_out = _WAYS_OUT.get(code, "see the page on credentials in the documentation, docs/credentials.md")
    if code in _REGION:
        way_out = f"set AWS_REGION={region[1]}" if region else "set AWS_REGION to the bucket's region"
    if anonymous and code in ("AccessDenied", "InvalidAccessKeyId"):
        way_out = f"the request was anonymous, because no keys were found: {KEYS}"
    return SystemFault(
        f"{where}: {code}: {unescape(message[1]) if message else 'the service gives no reason'}", way_out
    )


def asked_anew(url: str) -> str:
    """The redirect to a bucket's region, requested again without a signature: obstore drops its body."""
    import requests

    try:
        answer = requests.get(url, allow_redirects=False, timeout=10)
    except requests.RequestException:
        return _MOVED
    region = answer.headers.get("x-amz-bucket-region", "")
    body = answer.text if any(f"<Code>{code}</Code>" in answer.text for code in _REGION) else _MOVED
    return body + (f"<Region>{region}</Region>" if region else "")


def _profile(env: Mapping[str, str]) -> dict[str, str]:
    """The settings of the profile in use, from the config file, overridden by the credentials file."""
    name = env.get("AWS_PROFILE") or env.get("AWS_DEFAULT_PROFILE") or "default"
    home = env.get("HOME") or env.get("USERPROFILE") or ""
    files = [
        (env.get("AWS_CONFIG_FILE") or f"{home}/.aws/config", (f"profile {name}", *["default"][: name == "default"])),
        (env.get("AWS_SHARED_CREDENTIALS_FILE") or f"{home}/.aws/credentials", (name,)),
    ]  # fmt: skip
    settings: dict[str, str] = {}
    known = False
    for file, sections in files:
        path = Path(re.sub(r"^~(?=/)", home, file))
        parser = configparser.RawConfigParser(default_section="", strict=False)
        try:
            parser.read_string(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            continue
        except (OSError, UnicodeDecodeError, configparser.Error) as error:
            reason = str(error).partition("\n")[0]
            raise SystemFault(f"cannot read {path}: {reason}", KEYS) from error
        for section in sections:
            if parser.has_section(section):
                known = True
                settings |= dict(parser.items(section))
    if not known and env.get("AWS_PROFILE") and not env.get("AWS_ACCESS_KEY_ID"):
        raise SystemFault(
            f"there is no AWS profile '{name}' in {files[0][0]} or {files[1][0]}", "check AWS_PROFILE, or unset it"
        )
    return settings


def _has_role(env: Mapping[str, str]) -> bool:
    """Whether this is an AWS machine with a role. Then obstore fetches the role's keys."""
    import requests

    if _is_true(env.get("AWS_EC2_METADATA_DISABLED")):
        return False
    service = env.get("AWS_METADATA_ENDPOINT", "http://169.254.169.254").rstrip("/") + "/latest"
    try:
        with requests.Session() as session:
            session.trust_env = False  # no proxy for a request to the machine itself
            lifetime = {"X-aws-ec2-metadata-token-ttl-seconds": "60"}
            token = session.put(f"{service}/api/token", headers=lifetime, timeout=_PROBE)
            token.raise_for_status()
            roles = session.get(
                f"{service}/meta-data/iam/security-credentials/",
                headers={"X-aws-ec2-metadata-token": token.text}, timeout=_PROBE,
            )  # fmt: skip
    except (requests.RequestException, ValueError):
        return False
    return roles.status_code == 200 and bool(roles.text.strip())


def _first(env: Mapping[str, str], *names: str) -> str:
    return next((env[name] for name in names if env.get(name)), "")


def _is_true(text: str | None) -> bool:
    return (text or "").strip().lower() in ("1", "true", "yes", "on")
