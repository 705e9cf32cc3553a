"""Which model is served: where its checkpoint lies, what it is called, and in which number formats it runs."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field

from baton_operator.api.base import ObjectName, Strict
from baton_operator.api.rules import Place, rule

Dtype = Literal["auto", "float32", "bfloat16"]

DEMO_URI = "baton://demo"
_WORD = "[A-Za-z0-9_.-]+"    # spelled out: \w means other letters to other regular expressions
_HF = f"hf://{_WORD}/{_WORD}(@[A-Za-z0-9_./-]+)?"
_PVC = r"pvc://[a-z0-9]([-a-z0-9.]*[a-z0-9])?(/[^/].*)?"
_S3 = r"s3://[a-z0-9][a-z0-9.-]+/.+"
_URI = f"^({_HF}|{_PVC}|{_S3}|file://.+|{DEMO_URI})$"


class Model(Strict):
    """Which weights, and in which number format they are computed."""

    uri: Annotated[
        str,
        Field(
            min_length=1, max_length=1024,
            description="hf://owner/name, pvc://claim/folder, s3://bucket/folder, file:///folder (one machine only), "
            "or baton://demo, the tiny model that comes with Baton",
        ),
    ]  # fmt: skip
    revision: Annotated[
        str | None,
        Field(pattern="^[A-Za-z0-9_./-]+$", max_length=256, description="branch, tag or commit; default: main"),
    ] = None
    served_name: Annotated[
        str | None,
        Field(min_length=1, max_length=256, description="`model` in API requests; default: the last part of the uri"),
    ] = None
    dtype: Annotated[Dtype, Field(description="of weights and activations; auto = as the checkpoint says")] = "auto"
    kv_dtype: Annotated[
        Dtype, Field(description="of the KV cache, of all roles; auto = as dtype")
    ] = "auto"
    context_tokens: Annotated[
        int | None,
        Field(ge=16, le=16777216, description="longest prompt + answer; default: what the checkpoint supports"),
    ] = None
    endpoint: Annotated[
        str | None,
        Field(
            pattern=r"^https?://[A-Za-z0-9.:\[\]-]+(/[!-~]*)?$", max_length=512,
            description="server to fetch hf:// or s3:// from, instead of the public one",
        ),
    ] = None  # fmt: skip
    credentials_secret: Annotated[
        ObjectName | None,
        Field(description="Secret with HF_TOKEN, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, for the download"),
    ] = None
    cache_claim: Annotated[
        ObjectName | None,
        Field(description="claim that keeps what was downloaded, shared by all workers; default: a folder per pod"),
    ] = None

    @rule(
        cel=f"self.uri.matches(r'{_URI}')", field="uri",
        message="no known place of a checkpoint; use hf://owner/name, pvc://claim/folder, s3://bucket/folder, "
        "file:///folder (one machine only) or baton://demo",
    )  # fmt: skip
    def known_place(self) -> bool:
        return re.fullmatch(_URI, self.uri) is not None

    @rule(
        cel="!self.uri.startsWith('file://')", field="uri", places=frozenset({Place.CLUSTER}),
        message="file:// is a folder of one machine, which pods do not see; put the checkpoint on a volume and use "
        "pvc://claim/folder (file:// works with baton up)",
    )  # fmt: skip
    def no_folder_of_one_machine(self) -> bool:
        return not self.uri.startswith("file://")

    @rule(
        field="uri", places=frozenset({Place.MACHINE}),
        message="pvc:// and s3:// are read in a cluster only; on this machine use hf://, file:// or baton://demo",
    )  # fmt: skip
    def no_volume_of_a_cluster(self) -> bool:
        return not self.uri.startswith(("pvc://", "s3://"))

    @rule(
        cel="!has(self.revision) || (self.uri.startsWith('hf://') && !self.uri.contains('@'))", field="revision",
        message="revision is for hf:// without @revision in the uri; remove one of the two",
    )  # fmt: skip
    def one_revision(self) -> bool:
        return self.revision is None or (self.uri.startswith("hf://") and "@" not in self.uri)

    @rule(
        cel="!has(self.endpoint) || self.uri.startsWith('hf://') || self.uri.startsWith('s3://')", field="endpoint",
        message="endpoint is the server of an hf:// or s3:// uri; remove it or change the uri",
    )  # fmt: skip
    def endpoint_of_a_download(self) -> bool:
        return self.endpoint is None or self.downloads

    @rule(
        cel="!has(self.cacheClaim) || self.uri.startsWith('hf://') || self.uri.startsWith('s3://')",
        field="cacheClaim",
        message="cacheClaim keeps what hf:// or s3:// downloads; remove it, nothing is downloaded here",
    )
    def cache_of_a_download(self) -> bool:
        return self.cache_claim is None or self.downloads

    @rule(
        cel="self.kvDtype == 'auto' || self.dtype == 'auto' || self.dtype == 'float32' || self.kvDtype == self.dtype",
        field="kvDtype",
        message="kvDtype {kvDtype} is wider than dtype {dtype}, which costs memory and gains nothing; "
        "set kvDtype to auto or {dtype}",
    )
    def kv_no_wider_than_computed(self) -> bool:
        return "auto" in (self.kv_dtype, self.dtype) or self.dtype == "float32" or self.kv_dtype == self.dtype

    @property
    def downloads(self) -> bool:
        """Whether the checkpoint must be fetched from a server."""
        return self.uri.startswith(("hf://", "s3://"))

    @property
    def name(self) -> str:
        """What clients call it."""
        if self.served_name is not None:
            return self.served_name
        if self.uri == DEMO_URI:
            return "baton-demo"
        scheme, _, rest = self.uri.partition("://")
        if scheme == "hf":
            return rest.partition("@")[0]
        return rest.rstrip("/").rpartition("/")[2]

