"""The webhook's own authority (CA) and serving certificate: what a Secret holds, and what is due. Pure but for dice.

An authority is replaced at 2/3 of its life and stays in the bundle until it has expired; no serving certificate
outlives the authority that signed it. So whatever certificate a replica still serves, an API server with the bundle
trusts it. A new authority signs only once the API servers have long had it in their bundle (`trusted`).
"""

from __future__ import annotations

import base64
import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from baton_common.kube.objects import Object, text

_BACKDATE = datetime.timedelta(minutes=5)  # clocks of API servers may be behind ours
_AUTHORITIES, _AUTHORITY_KEY, _SERVING, _SERVING_KEY = "ca.crt", "ca.key", "tls.crt", "tls.key"


@dataclass(frozen=True, slots=True, kw_only=True)
class Lifetimes:
    """`settle_s`: how long API servers may take to notice a bundle. `check_s`: between two looks of a replica."""

    serving: datetime.timedelta = datetime.timedelta(days=60)
    authority: datetime.timedelta = datetime.timedelta(days=365)
    settle_s: float = 60.0
    check_s: float = 30.0

    def __post_init__(self) -> None:
        if self.serving > datetime.timedelta(days=90) or self.serving > self.authority / 3:
            raise ValueError("a serving certificate lives at most 90 days, and a third of its authority's life")


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyRing:
    """`authorities`: newest first; `authority_key` is the newest one's."""

    authorities: tuple[x509.Certificate, ...]
    authority_key: ec.EllipticCurvePrivateKey
    serving: x509.Certificate
    serving_key: ec.EllipticCurvePrivateKey

    @property
    def bundle(self) -> str:
        """All authorities to trust, PEM."""
        return "".join(_pem(item) for item in self.authorities)

    @property
    def newest(self) -> str:
        """The authority that signs, PEM."""
        return _pem(self.authorities[0])

    @property
    def chain(self) -> str:
        """Serving certificate and its key, PEM."""
        return _pem(self.serving) + _key_pem(self.serving_key)

    def as_data(self) -> Mapping[str, str]:
        """`data` of a Secret."""
        parts = {
            _AUTHORITIES: self.bundle, _AUTHORITY_KEY: _key_pem(self.authority_key), _SERVING: _pem(self.serving),
            _SERVING_KEY: _key_pem(self.serving_key),
        }  # fmt: skip
        return {name: base64.b64encode(part.encode()).decode() for name, part in parts.items()}


def read_ring(data: Object) -> KeyRing | None:
    """From `data` of a Secret. None: empty, or no ring of ours any more."""
    try:
        authorities = tuple(x509.load_pem_x509_certificates(_part(data, _AUTHORITIES)))
        serving = x509.load_pem_x509_certificate(_part(data, _SERVING))
        authority_key = _key(_part(data, _AUTHORITY_KEY))
        serving_key = _key(_part(data, _SERVING_KEY))
    except (ValueError, TypeError, UnsupportedAlgorithm):
        return None
    if authorities[0].public_key() != authority_key.public_key() or serving.public_key() != serving_key.public_key():
        return None
    return KeyRing(authorities=authorities, authority_key=authority_key, serving=serving, serving_key=serving_key)


def advance(
    ring: KeyRing | None, *, now: datetime.datetime, names: Sequence[str], trusted: bool, times: Lifetimes
) -> KeyRing:
    """The ring as it should be now; the very same one when nothing is due.

    `trusted`: API servers have the ring's newest authority. `names`: what the serving certificate speaks for; the first
    one names the authority too.
    """
    if ring is None or _expired(ring.authorities[0], now):
        authority, key = _new_authority(names[0], now, times)
        serving, serving_key = _new_serving(names, now, times, authority, key)
        return KeyRing(authorities=(authority,), authority_key=key, serving=serving, serving_key=serving_key)
    alive = tuple(item for item in ring.authorities if not _expired(item, now))
    if _due(alive[0], now):
        authority, key = _new_authority(names[0], now, times)
        ring, trusted = replace(ring, authorities=(authority, *alive), authority_key=key), False
    elif len(alive) < len(ring.authorities):
        ring = replace(ring, authorities=alive)
    # an expired certificate is of no use to anyone: then an authority that few know yet is better
    may_sign = trusted or _expired(ring.serving, now)
    if _due(ring.serving, now) and may_sign:
        serving, serving_key = _new_serving(names, now, times, ring.authorities[0], ring.authority_key)
        ring = replace(ring, serving=serving, serving_key=serving_key)
    return ring


def _part(data: Object, name: str) -> bytes:
    return base64.b64decode(text(data, name))


def _key(pem: bytes) -> ec.EllipticCurvePrivateKey:
    key = serialization.load_pem_private_key(pem, None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise TypeError("not a key that we make")
    return key


def _expired(certificate: x509.Certificate, now: datetime.datetime) -> bool:
    return now >= certificate.not_valid_after_utc


def _due(certificate: x509.Certificate, now: datetime.datetime) -> bool:
    made, ends = certificate.not_valid_before_utc + _BACKDATE, certificate.not_valid_after_utc
    return now >= made + (ends - made) * 2 / 3


def _new_authority(
    name: str, now: datetime.datetime, times: Lifetimes
) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    key = ec.generate_private_key(ec.SECP256R1())
    subject = _subject(f"{name[:40]} {now:%Y%m%d%H%M%S}")  # a common name has at most 64 characters
    return _certificate(subject, key, (subject, key), now, now + times.authority, names=()), key


def _new_serving(
    names: Sequence[str], now: datetime.datetime, times: Lifetimes, authority: x509.Certificate,
    authority_key: ec.EllipticCurvePrivateKey,
) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:  # fmt: skip
    key = ec.generate_private_key(ec.SECP256R1())
    ends = min(now + times.serving, authority.not_valid_after_utc)
    signer = (authority.subject, authority_key)
    return _certificate(_subject(names[0][:64]), key, signer, now, ends, names=names), key


def _certificate(
    subject: x509.Name, key: ec.EllipticCurvePrivateKey, signer: tuple[x509.Name, ec.EllipticCurvePrivateKey],
    now: datetime.datetime, ends: datetime.datetime, *, names: Sequence[str],
) -> x509.Certificate:  # fmt: skip
    """Of a server with `names`; without any, of an authority."""
    issuer, issuer_key = signer
    authority = not names
    usage = x509.KeyUsage(
        digital_signature=not authority, key_cert_sign=authority, crl_sign=authority, content_commitment=False,
        key_encipherment=False, data_encipherment=False, key_agreement=False, encipher_only=False, decipher_only=False,
    )  # fmt: skip
    builder = (
        x509.CertificateBuilder(subject_name=subject, issuer_name=issuer, public_key=key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now.replace(microsecond=0) - _BACKDATE)
        .not_valid_after(ends.replace(microsecond=0))
        .add_extension(x509.BasicConstraints(ca=authority, path_length=0 if authority else None), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False)
    )
    if names:
        alternatives = x509.SubjectAlternativeName([x509.DNSName(name) for name in names])
        builder = builder.add_extension(alternatives, critical=False).add_extension(
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False
        )
    return builder.sign(issuer_key, hashes.SHA256())


def _subject(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _pem(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(serialization.Encoding.PEM).decode()


def _key_pem(key: ec.EllipticCurvePrivateKey) -> str:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ).decode()
