"""How S3 is reached: keys, profiles, endpoints, regions; and what is said where the service refuses."""

from __future__ import annotations

import os
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

import latentprep
from latentprep.errors import SystemFault
from latentprep.storage import aws, buckets
from latentprep.storage.aws import s3_settings
from latentprep.storage.places import place
from loopback import Loopback

pytest.importorskip("obstore", reason="obstore is not installed")

CREDENTIALS = """
[default]
aws_access_key_id = AKDEFAULT
aws_secret_access_key = s%cret=/+
[work]
aws_access_key_id = AKWORK
aws_secret_access_key = secret
aws_session_token = token==
"""
CONFIG = """
[default]
region = eu-central-1
[profile work]
region = eu-west-3
endpoint_url = http://127.0.0.1:9
s3 =
    addressing_style = path
[profile login]
sso_session = company
region = eu-west-1
[profile switched]
role_arn = arn:aws:iam::1:role/x
source_profile = default
"""


class Service:
    """A server that gives the same answer to all requests. seen: their methods and headers."""

    def __init__(self) -> None:
        self.status, self.body, self.headers = 200, "", {}
        self.seen: list[tuple[str, dict[str, str]]] = []
        service = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def do_any(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length") or 0))
                service.seen.append((self.command, dict(self.headers)))
                data = service.body.encode()
                self.send_response(service.status)
                for name, value in service.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(data)

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = do_any

            def log_message(self, *_: object) -> None:
                pass

        self.server = Loopback(Handler)
        self.url = self.server.url

    def refuse(self, status: int, code: str, message: str, more: str = "") -> None:
        text = f"<Error><Code>{code}</Code><Message>{message}</Message>{more}<RequestId>1</RequestId></Error>"
        self.status, self.body = status, f'<?xml version="1.0" encoding="UTF-8"?>\n{text}'


@pytest.fixture
def service() -> Iterator[Service]:
    found = Service()
    yield found
    found.server.close()


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A home with nothing in it, and an environment without a word about AWS."""
    for name in os.environ:
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setattr(buckets, "PAUSE", 0.005)
    buckets.open_bucket.cache_clear()
    yield
    buckets.open_bucket.cache_clear()


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / ".aws").mkdir()
    (tmp_path / ".aws" / "credentials").write_text(CREDENTIALS)
    (tmp_path / ".aws" / "config").write_text(CONFIG)
    return tmp_path / ".aws"


def test_keys_and_region_of_a_profile(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    default = {"region": "eu-central-1", "access_key_id": "AKDEFAULT", "secret_access_key": "s%cret=/+"}
    assert s3_settings() == default
    monkeypatch.setenv("AWS_PROFILE", "work")
    assert s3_settings() == {
        "endpoint": "http://127.0.0.1:9", "region": "eu-west-3",
        "access_key_id": "AKWORK", "secret_access_key": "secret", "session_token": "token==",
    }  # fmt: skip
    monkeypatch.setenv("AWS_REGION", "us-west-2")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKENV")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    found = s3_settings()
    assert (found["access_key_id"], found["secret_access_key"], found["region"]) == ("AKENV", "x", "us-west-2")
    assert "session_token" not in found  # the profile's token is not these keys'


def test_files_elsewhere_are_read(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files.rename(tmp_path / "elsewhere")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "~/elsewhere/credentials")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "elsewhere" / "config"))
    found = s3_settings()
    assert (found["access_key_id"], found["region"]) == ("AKDEFAULT", "eu-central-1")


@pytest.mark.parametrize(
    ("profile", "words"),
    [
        ("login", r"'login' has no keys but sso_session.*export-credentials --profile login --format env"),
        ("switched", r"'switched' has no keys but role_arn.*export-credentials --profile switched"),
        ("typo", r"there is no AWS profile 'typo' in .*/config or .*/credentials; check AWS_PROFILE"),
    ],
)
def test_a_profile_without_keys_is_refused(
    files: Path, monkeypatch: pytest.MonkeyPatch, profile: str, words: str
) -> None:
    monkeypatch.setenv("AWS_PROFILE", profile)
    with pytest.raises(SystemFault, match=words):
        s3_settings()


def test_a_damaged_file_and_half_of_the_keys_are_refused(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKENV")
    with pytest.raises(SystemFault, match="only one of the two keys for S3 is set, access_key_id"):
        s3_settings()
    (files / "config").write_text("region = nowhere\n")
    with pytest.raises(SystemFault, match="cannot read .*config: .*no section"):
        s3_settings()


def test_without_keys_requests_are_anonymous(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    assert s3_settings() == {"skip_signature": True}
    monkeypatch.setenv("AWS_ENDPOINT_URL", service.url)
    service.body = "all of it"
    assert place("s3://public/file").read_bytes() == b"all of it"
    assert [method for method, _ in service.seen] == ["GET"]
    assert "authorization" not in {name.lower() for name in service.seen[0][1]}
    service.refuse(403, "AccessDenied", "Access Denied")
    with pytest.raises(SystemFault, match=r"AccessDenied: Access Denied; the request was anonymous.*AWS_PROFILE"):
        place("s3://public/file").read_bytes()


@pytest.mark.parametrize("variable", ["AWS_SKIP_SIGNATURE", "AWS_NO_SIGN_REQUEST"])
def test_a_public_bucket_is_asked_for(files: Path, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, "true")
    assert s3_settings() == {"region": "eu-central-1", "skip_signature": True}


def test_a_machines_role_is_left_to_obstore(monkeypatch: pytest.MonkeyPatch, service: Service) -> None:
    monkeypatch.delenv("AWS_EC2_METADATA_DISABLED")
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", service.url)
    service.body = "role-of-this-machine"
    assert s3_settings() == {}
    assert [method for method, _ in service.seen] == ["PUT", "GET"]
    service.status = 404  # another cloud's service
    assert s3_settings() == {"skip_signature": True}
    monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "/role")
    assert s3_settings() == {}


@pytest.mark.parametrize("variable", ["AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT", "profile"])
def test_any_of_the_endpoints_names_is_taken_over_http(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    (tmp_path / ".aws").mkdir()
    (tmp_path / ".aws" / "credentials").write_text(CREDENTIALS)
    if variable == "profile":
        (tmp_path / ".aws" / "config").write_text(f"[default]\nendpoint_url = {service.url}\n")
    else:
        monkeypatch.setenv(variable, service.url)
    service.body = "here"
    assert place("s3://bucket/file").read_bytes() == b"here"
    assert "Credential=AKDEFAULT/" in service.seen[0][1]["authorization"]


REFUSALS = [
    (400, "ExpiredToken", "", "get new keys, .*AWS_SESSION_TOKEN"),
    (400, "AuthorizationHeaderMalformed", "<Region>eu-west-1</Region>", "set AWS_REGION=eu-west-1"),
    (301, "PermanentRedirect", "<Endpoint>elsewhere</Endpoint>", "set AWS_REGION=eu-west-1"),
    (404, "NoSuchBucket", "", "check the bucket's name.*AWS_ENDPOINT_URL"),
    (403, "AccessDenied", "", "AWS_PROFILE.*AWS_SKIP_SIGNATURE=true"),
    (403, "InvalidAccessKeyId", "", "check AWS_ACCESS_KEY_ID"),
    (403, "SignatureDoesNotMatch", "", "check AWS_SECRET_ACCESS_KEY"),
    (400, "NeverHeardOf", "", "docs/credentials.md"),
]


@pytest.mark.parametrize("endpoint", ["localhost:9000", "ht!tp://x y", "http://a b", "http://x:port", "https://"])
def test_an_endpoint_that_is_no_address_is_refused(files: Path, monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    with pytest.raises(SystemFault, match=r"is no address of an S3 service; set AWS_ENDPOINT_URL"):
        s3_settings()


@pytest.mark.parametrize(
    "endpoint", ["http://[::1]:9000", "https://x.r2.example.com/my%20base/", "http://minio_1:9000"]
)
def test_endpoints_of_all_shapes_are_taken(files: Path, monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    assert s3_settings()["endpoint"] == endpoint.rstrip("/")


@pytest.mark.parametrize(("status", "code", "more", "way_out"), REFUSALS, ids=[code for _, code, _, _ in REFUSALS])
def test_what_the_service_refuses_is_said_whole(
    service: Service, files: Path, monkeypatch: pytest.MonkeyPatch, status: int, code: str, more: str, way_out: str
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", service.url)
    message = "What the service has to say &amp; says at length. " + "More of it. " * 60 + "The end."
    service.refuse(status, code, message, more)
    service.headers = {"x-amz-bucket-region": "eu-west-1"}
    said = rf"s3://bucket/file: {code}: What the service has to say & says at length\..*The end\.; .*{way_out}"
    file = place("s3://bucket/file")
    calls = [file.read_bytes, lambda: file.write_bytes(b"x"), lambda: list(file.iterdir())]
    calls += [file.is_file] if code != "NoSuchBucket" else []  # a HEAD's 404 does not say of what
    for call in calls:
        service.seen.clear()
        with pytest.raises(SystemFault, match=said):
            call()
        assert len(service.seen) <= 3  # what is refused is not asked for again and again
    with pytest.raises(SystemFault, match=f"s3://bucket/codes/manifest.json: {code}: .*{way_out}"):
        latentprep.open("s3://bucket/codes")


def test_what_may_pass_is_asked_for_again(service: Service, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", service.url)
    service.refuse(400, "RequestTimeout", "Your socket connection was not read from. " * 20)
    with pytest.raises(SystemFault, match=r"RequestTimeout.*(not read from.*){20}run the same command again"):
        place("s3://bucket/file").read_bytes()
    assert len(service.seen) == buckets.ATTEMPTS
    assert aws.refusal("<Code>NoSuchKey</Code>", "x") is None
