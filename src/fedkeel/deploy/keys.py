"""Keys and certificates of a deployment's private authority."""

from __future__ import annotations

import datetime
import ipaddress
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fedkeel.deploy.manifest import DeployError

if TYPE_CHECKING:  # the library is of an extra
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

AUTHORITY_DAYS, SERVER_DAYS = 1826, 398
EARLY = datetime.timedelta(hours=1)  # certificates are valid from this long ago: a site's clock may be behind


def is_ip(host: str) -> bool:
    """Whether this is an IPv4 or IPv6 address, without brackets."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def new_key() -> EllipticCurvePrivateKey:
    """A fresh EC P-384 key. Raises DeployError where the library for it is not installed."""
    try:
        from cryptography.hazmat.primitives.asymmetric import ec
    except ImportError as error:
        raise DeployError(
            "keys and certificates need a library that is not installed: pip install 'cryptography>=44,<51'"
        ) from error
    return ec.generate_private_key(ec.SECP384R1())


def pem(key: EllipticCurvePrivateKey) -> bytes:
    """The private key as PKCS#8, as TLS servers read it."""
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def ssh_pair(key: EllipticCurvePrivateKey, comment: str) -> tuple[bytes, bytes]:
    """(private, public) in OpenSSH's format, as `flower-supernode` and `flwr supernode register` read them."""
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

    private = key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    return private, public + f" {comment}\n".encode()


def certificate(
    subject: str,
    key: EllipticCurvePrivateKey,
    days: float,
    names: Sequence[str] = (),
    issuer: tuple[x509.Certificate, EllipticCurvePrivateKey] | None = None,
) -> x509.Certificate:
    """A certificate for `key`, valid for `days` from now: without issuer an authority that may sign servers and nothing below
    them; with one a server's, for `names` (DNS or IP). Serial numbers are random (159 bits)."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    now = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
    own = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)])
    issuing_key = issuer[1] if issuer else key
    builder = (
        x509.CertificateBuilder()
        .subject_name(own)
        .issuer_name(issuer[0].subject if issuer else own)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - EARLY)
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None if issuer else 0), critical=True)
        .add_extension(_usage(authority=issuer is None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuing_key.public_key()), critical=False)
    )
    if issuer:
        general = [x509.IPAddress(ipaddress.ip_address(n)) if is_ip(n) else x509.DNSName(n) for n in names]
        builder = builder.add_extension(x509.SubjectAlternativeName(general), critical=False).add_extension(
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False
        )
    return builder.sign(issuing_key, hashes.SHA384())


def _usage(authority: bool) -> x509.KeyUsage:
    """What a certificate's key may do: an authority's signs certificates and revocation lists, a server's handshakes."""
    from cryptography import x509

    return x509.KeyUsage(
        digital_signature=not authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=authority,
        crl_sign=authority,
        encipher_only=False,
        decipher_only=False,
    )
