"""A Hugging Face hub, or another server that speaks its HTTP API. The revision is pinned to its commit when listed.

Names, sizes and digests come from huggingface_hub; ranges are read here, from wherever the hub sends us: its own
download keeps nothing of an interrupted large file. The token goes to the hub alone, never to the storage behind it.
"""

from __future__ import annotations

import threading
import time
from urllib.parse import urlsplit

import httpx2
from huggingface_hub import HfApi, get_hf_file_metadata, get_token, hf_hub_url
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoSibling

from baton_fetch.digests import GIT, SIZE_ONLY, Digest
from baton_fetch.errors import FetchFailed, Mistake, Unavailable
from baton_fetch.request import HubPlace
from baton_fetch.source import RemoteFile, Snapshot

_BUSY = frozenset({408, 425, 429, 500, 502, 503, 504})
_TIMEOUT = httpx2.Timeout(30.0, connect=10.0)
_LOCATION_S = 600.0     # signed addresses live for about an hour
_SHA256_DIGITS, _SHA1_DIGITS = 64, 40


class Hub:
    def __init__(self, place: HubPlace, *, uri: str, endpoint: str) -> None:
        self._place, self._uri = place, uri
        self._token = get_token()
        self._credentials = {"Authorization": f"Bearer {self._token}"} if self._token else {}
        self._api = HfApi(endpoint=endpoint or None, token=self._token or False)
        self._client = httpx2.Client(timeout=_TIMEOUT, follow_redirects=True)
        self._commit = ""
        self._locations: dict[str, tuple[str, float]] = {}
        self._locating = threading.Lock()

    def list_files(self, version: str) -> Snapshot:
        try:
            info = self._api.model_info(
                self._place.name, revision=version or self._place.revision, files_metadata=True, timeout=30.0
            )
        except RevisionNotFoundError:
            if version:     # the branch was rewritten since: what it is now counts
                return self.list_files("")
            raise Mistake(f"{self._uri}: has no revision {self._place.revision!r}; check spec.model.revision") from None
        except (HfHubHTTPError, httpx2.HTTPError, OfflineModeIsEnabled, HFValidationError) as error:
            raise self._translated(error) from None
        if not info.sha:
            raise FetchFailed(f"{self._uri}: the hub names no commit; check spec.model.endpoint")
        self._commit = info.sha
        files = [self._file(item) for item in info.siblings or [] if "/" not in item.rfilename]
        return Snapshot(version=info.sha, files={file.name: file for file in files})

    def digest_of(self, file: RemoteFile) -> Digest:
        if len(file.pin) == _SHA256_DIGITS:
            return Digest(algorithm="sha256", value=file.pin)
        return Digest(algorithm=GIT if len(file.pin) == _SHA1_DIGITS else SIZE_ONLY, value=file.pin)

    def read(self, file: RemoteFile, begin: int, end: int) -> bytes:
        location = self._location(file.name)
        headers = {"Range": f"bytes={begin}-{end - 1}", "Accept-Encoding": "identity"}
        if _origin(location) == _origin(self._api.endpoint):
            headers |= self._credentials
        try:
            with self._client.stream("GET", location, headers=headers) as answer:
                if answer.status_code == 206 or (answer.status_code == 200 and (begin, end) == (0, file.size_bytes)):
                    return answer.read()
                status = answer.status_code
        except httpx2.HTTPError as error:
            raise self._translated(error) from None
        if status == 200:
            raise FetchFailed(f"{self._uri}: {urlsplit(location).hostname} does not answer ranges; check the proxy")
        self._forget(file.name, location)   # signed addresses expire: the next try asks for a new one
        raise Unavailable(f"{file.name}: HTTP {status} from {urlsplit(location).hostname}")

    def _file(self, item: RepoSibling) -> RemoteFile:
        digest = item.lfs.sha256 if item.lfs else item.blob_id
        if item.size is not None and digest:
            return RemoteFile(name=item.rfilename, size_bytes=item.size, pin=digest)
        # mirrors that leave the details out still send them with the file
        try:
            metadata = get_hf_file_metadata(self._url(item.rfilename), token=self._token or False)
        except (HfHubHTTPError, httpx2.HTTPError) as error:
            raise self._translated(error) from None
        if metadata.size is None or not metadata.etag:
            raise FetchFailed(f"{self._uri}: the hub tells no size of {item.rfilename}; check spec.model.endpoint")
        return RemoteFile(name=item.rfilename, size_bytes=metadata.size, pin=metadata.etag)

    def _location(self, name: str) -> str:
        """Where the bytes are, asked once per file and not once per range."""
        with self._locating:
            known = self._locations.get(name)
            if known is not None and time.monotonic() - known[1] < _LOCATION_S:
                return known[0]
            try:
                metadata = get_hf_file_metadata(self._url(name), token=self._token or False)
            except (HfHubHTTPError, httpx2.HTTPError) as error:
                raise self._translated(error) from None
            self._locations[name] = (metadata.location, time.monotonic())
            return metadata.location

    def _forget(self, name: str, location: str) -> None:
        with self._locating:
            if self._locations.get(name, ("", 0.0))[0] == location:
                del self._locations[name]

    def _url(self, name: str) -> str:
        return hf_hub_url(self._place.name, name, revision=self._commit, endpoint=self._api.endpoint)

    def _translated(self, error: Exception) -> Exception:
        """Without addresses in it: they may carry signatures."""
        host = urlsplit(self._api.endpoint).netloc
        if isinstance(error, GatedRepoError):
            return Mistake(f"{self._uri}: gated; accept its terms on {host}, and give a token in credentialsSecret")
        if isinstance(error, HFValidationError):
            return Mistake(f"{self._uri}: no name of a model on a hub; check spec.model.uri")
        if isinstance(error, OfflineModeIsEnabled):
            return Mistake(f"{self._uri}: HF_HUB_OFFLINE is set; unset it, or mount the model with pvc://")
        if isinstance(error, RepositoryNotFoundError):
            return Mistake(
                f"{self._uri}: not found or not public; check spec.model.uri, or give a token in credentialsSecret"
            )
        if isinstance(error, HfHubHTTPError):
            status = error.response.status_code
            if status in _BUSY:
                return Unavailable(f"HTTP {status} from {host}")
            if status in (401, 403):
                return Mistake(f"{self._uri}: denied by {host} (HTTP {status}); check the token in credentialsSecret")
            return Mistake(f"{self._uri}: HTTP {status} from {host}; check spec.model.uri and endpoint")
        return Unavailable(f"{host}: {' '.join(str(error).split()) or type(error).__name__}"[:160])


def _origin(address: str) -> tuple[str, str]:
    parts = urlsplit(address)
    return parts.scheme, parts.netloc
