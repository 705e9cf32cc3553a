"""An S3 server on loopback: moto's, in a thread. It does ranges, If-Match, checksums and signatures as S3 does."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import botocore.session
import moto.settings
from botocore.config import Config
from moto.server import ThreadedMotoServer

REGION = "eu-central-1"
PART_BYTES = 5 << 20    # the smallest that S3 takes


class S3Server:
    def __init__(self) -> None:
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self._server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        self._server.start()
        self.port: int = self._server.get_host_and_port()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._s3 = self._client("s3")
        key = self._new_user()
        self.environment: Mapping[str, str] = {
            "AWS_ACCESS_KEY_ID": key["AccessKeyId"], "AWS_SECRET_ACCESS_KEY": key["SecretAccessKey"],
            "AWS_REGION": REGION,
        }  # fmt: skip

    def close(self) -> None:
        self._server.stop()

    @contextmanager
    def signatures_checked(self) -> Iterator[None]:
        """Meanwhile every request must be signed by a user that exists."""
        before = moto.settings.INITIAL_NO_AUTH_ACTION_COUNT
        moto.settings.INITIAL_NO_AUTH_ACTION_COUNT = 0
        try:
            yield
        finally:
            moto.settings.INITIAL_NO_AUTH_ACTION_COUNT = before

    def make_bucket(self, name: str) -> None:
        self._s3.create_bucket(Bucket=name, CreateBucketConfiguration={"LocationConstraint": REGION})

    def put(self, bucket: str, key: str, data: bytes, *, checksum: str = "") -> None:
        """`checksum`: an algorithm as S3 calls it, "" = none but the ETag."""
        extra = {"ChecksumAlgorithm": checksum} if checksum else {}
        self._s3.put_object(Bucket=bucket, Key=key, Body=data, **extra)

    def put_in_parts(self, bucket: str, key: str, data: bytes) -> None:
        """The ETag is then an MD5 over the MD5s of the parts."""
        upload = self._s3.create_multipart_upload(Bucket=bucket, Key=key)["UploadId"]
        parts = []
        for number, begin in enumerate(range(0, len(data), PART_BYTES), 1):
            done = self._s3.upload_part(
                Bucket=bucket, Key=key, UploadId=upload, PartNumber=number, Body=data[begin : begin + PART_BYTES]
            )
            parts.append({"PartNumber": number, "ETag": done["ETag"]})
        self._s3.complete_multipart_upload(
            Bucket=bucket, Key=key, UploadId=upload, MultipartUpload={"Parts": parts}
        )

    def _client(self, service: str) -> Any:
        return botocore.session.Session().create_client(
            service, region_name=REGION, endpoint_url=self.url, aws_access_key_id="set-up", aws_secret_access_key="x",
            config=Config(s3={"addressing_style": "path"}, request_checksum_calculation="when_required"),
        )  # fmt: skip

    def _new_user(self) -> dict[str, str]:
        iam = self._client("iam")
        iam.create_user(UserName="reader")
        iam.put_user_policy(
            UserName="reader", PolicyName="read",
            PolicyDocument='{"Version": "2012-10-17", "Statement": '
            '[{"Effect": "Allow", "Action": ["s3:GetObject", "s3:ListBucket"], "Resource": "*"}]}',
        )  # fmt: skip
        key: dict[str, str] = iam.create_access_key(UserName="reader")["AccessKey"]
        return key
