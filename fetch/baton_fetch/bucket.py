"""An S3 bucket, or one of a server that speaks S3 (path-style addresses then). Content is pinned by its ETag.

Credentials, proxies and CA bundles are found as botocore finds them; without credentials requests are not signed, which
is right for public buckets. Which checksum a server has decides how a file is verified: a whole-file one, one over the
parts of its upload, the ETag where that is an MD5, else the size.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import botocore.session
from botocore import UNSIGNED
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionError,
    CredentialRetrievalError,
    HTTPClientError,
    InvalidRegionError,
    MetadataRetrievalError,
    NoCredentialsError,
    ParamValidationError,
    PartialCredentialsError,
    ProfileNotFound,
    TokenRetrievalError,
)
from urllib3.exceptions import HTTPError

from baton_fetch.digests import SIZE_ONLY, Digest
from baton_fetch.errors import Changed, FetchFailed, Mistake, Unavailable
from baton_fetch.request import BucketPlace
from baton_fetch.source import RemoteFile, Snapshot

_CHECKSUMS = {
    "ChecksumSHA256": "sha256", "ChecksumCRC64NVME": "crc64nvme", "ChecksumCRC32C": "crc32c",
    "ChecksumCRC32": "crc32", "ChecksumSHA1": "sha1",
}  # fmt: skip
_ETAG = re.compile(r"([0-9a-f]{32})(?:-(\d+))?")
_BUSY = frozenset({408, 425, 429, 500, 502, 503, 504})
_DENIED = frozenset({401, 403})
_LATER = (ConnectionError, HTTPClientError, CredentialRetrievalError, MetadataRetrievalError, TokenRetrievalError)
_DEFAULT_REGION = "us-east-1"


class Bucket:
    def __init__(
        self, place: BucketPlace, *, uri: str, endpoint: str, environment: Mapping[str, str], streams: int
    ) -> None:
        self._place, self._uri = place, uri
        with self._translated(""):
            session = botocore.session.Session()
            own = environment.get("AWS_ENDPOINT_URL_S3") or environment.get("AWS_ENDPOINT_URL")
            region = environment.get("AWS_REGION") or session.get_config_variable("region")
            ca_bundle = environment.get("AWS_CA_BUNDLE") or environment.get("SSL_CERT_FILE")
            self._client: Any = session.create_client(
                "s3",
                endpoint_url=endpoint or None,
                region_name=region or _DEFAULT_REGION,
                verify=ca_bundle or None,
                config=Config(
                    signature_version=None if session.get_credentials() else UNSIGNED,
                    s3={"addressing_style": "path" if endpoint or own else "auto"},
                    retries={"total_max_attempts": 1},      # the caller's patience counts, not a second one below it
                    connect_timeout=10, read_timeout=30, max_pool_connections=streams,
                    response_checksum_validation="when_required",    # whole files are verified, not ranges
                ),
            )  # fmt: skip

    def list_files(self, version: str) -> Snapshot:
        found: dict[str, RemoteFile] = {}
        with self._translated(""):
            pages = self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self._place.bucket, Prefix=self._place.prefix, Delimiter="/"
            )
            for page in pages:
                for item in page.get("Contents", ()):
                    name = str(item["Key"]).removeprefix(self._place.prefix)
                    if name:
                        found[name] = RemoteFile(name=name, size_bytes=int(item["Size"]), pin=str(item["ETag"]))
        if not found:
            raise Mistake(f"{self._uri}: nothing is there; check the bucket and the prefix in spec.model.uri")
        return Snapshot(version="", files=found)

    def digest_of(self, file: RemoteFile) -> Digest:
        with self._translated(file.name):
            head = self._client.head_object(**self._object(file), ChecksumMode="ENABLED")
            for field, algorithm in _CHECKSUMS.items():
                if field in head:
                    value, _, parts = str(head[field]).partition("-")
                    checksum = base64.b64decode(value).hex()
                    if digest := self._over_parts(file, algorithm, checksum, int(parts or 0)):
                        return digest
            etag = _ETAG.fullmatch(file.pin.strip('"'))
            keyed = head.get("ServerSideEncryption", "").startswith("aws:kms") or "SSECustomerAlgorithm" in head
            if etag is None or keyed:   # then the ETag is no MD5
                return Digest(algorithm=SIZE_ONLY)
            return self._over_parts(file, "md5", etag[1], int(etag[2] or 0)) or Digest(algorithm=SIZE_ONLY)

    def read(self, file: RemoteFile, begin: int, end: int) -> bytes:
        with self._translated(file.name):
            answer = self._client.get_object(**self._object(file), Range=f"bytes={begin}-{end - 1}")
            if answer["ETag"] != file.pin:      # of a server that knows no If-Match
                raise Changed(f"{file.name} has changed")
            if answer["ContentLength"] != end - begin:
                raise FetchFailed(f"{self._uri}: the server does not answer ranges; check spec.model.endpoint")
            data = answer["Body"].read()
            return data if isinstance(data, bytes) else b""

    def _over_parts(self, file: RemoteFile, algorithm: str, value: str, parts: int) -> Digest | None:
        """`parts` 0: over the whole file. None where the size of the parts cannot be known."""
        if parts == 0:
            return Digest(algorithm=algorithm, value=value)
        # without If-Match: some servers compare it with the ETag of the part
        where = {"Bucket": self._place.bucket, "Key": f"{self._place.prefix}{file.name}"}
        piece_bytes = int(self._client.head_object(**where, PartNumber=1)["ContentLength"])
        if piece_bytes <= 0 or -(-file.size_bytes // piece_bytes) != parts:
            return None     # parts of different sizes, or a server without part numbers
        return Digest(algorithm=algorithm, value=value, piece_bytes=piece_bytes)

    def _object(self, file: RemoteFile) -> dict[str, str]:
        return {"Bucket": self._place.bucket, "Key": f"{self._place.prefix}{file.name}", "IfMatch": file.pin}

    @contextmanager
    def _translated(self, name: str) -> Iterator[None]:
        """Errors of the library as ours. `name`: the file it is about, or ""."""
        what = f"{self._uri}{f': {name}' if name else ''}"
        try:
            yield
        except ClientError as error:
            raise self._refusal(error, what, name) from None
        except (NoCredentialsError, PartialCredentialsError, ProfileNotFound, InvalidRegionError) as error:
            raise Mistake(f"{what}: {_text(error)}; check the Secret in credentialsSecret") from None
        except ParamValidationError as error:
            raise Mistake(f"{what}: {_text(error)}; check spec.model.uri") from None
        except (*_LATER, HTTPError) as error:
            raise Unavailable(f"{name or self._place.bucket}: {_text(error)}") from None
        except (BotoCoreError, ValueError) as error:
            raise FetchFailed(f"{what}: {_text(error)}") from None

    def _refusal(self, error: ClientError, what: str, name: str) -> Exception:
        code = str(error.response.get("Error", {}).get("Code", ""))
        status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        if status == 412 or (name and status == 404):
            return Changed(f"{name} has changed")
        if code == "NoSuchBucket" or status == 404:
            return Mistake(f"{what}: no such bucket; check spec.model.uri and endpoint")
        if status in _BUSY or code in ("SlowDown", "RequestTimeout"):
            return Unavailable(f"{name or self._place.bucket}: {code} (HTTP {status})")
        if status in _DENIED or code in ("ExpiredToken", "InvalidToken"):
            return Mistake(
                f"{what}: denied ({code}); check the keys in credentialsSecret, and that they may list and read there"
            )
        if status in (301, 307, 400):
            return Mistake(f"{what}: refused ({code}, HTTP {status}); check AWS_REGION in the Secret, and endpoint")
        return FetchFailed(f"{what}: {code} (HTTP {status})")


def _text(error: Exception) -> str:
    """Without the query of an address: long, and nobody's business."""
    return (re.sub(r'\?[^"\s]*', "", " ".join(str(error).split())) or type(error).__name__)[:160]
