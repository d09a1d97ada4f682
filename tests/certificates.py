"""A root, and a leaf that it signs, as C2PA wants them: in PEM, made anew for each test."""

import datetime

NAMES = ("root.pem", "chain.pem", "key.pem", "alone.pem")


def write_certificates(folder):
    """NAMES in `folder`: the root; leaf and root; the leaf's key; a leaf that the same key signed itself."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    now = datetime.datetime.now(datetime.UTC)
    root_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    usages = ("digital_signature", "key_cert_sign", "crl_sign", "content_commitment", "key_encipherment")
    usages += ("data_encipherment", "key_agreement", "encipher_only", "decipher_only")

    def certificate(name, own, issuer, signed_by, ca):
        subject, by = (
            x509.Name([
                x509.NameAttribute(NameOID.COMMON_NAME, each),
                x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Testers"),
            ])
            for each in (name, issuer)
        )  # fmt: skip
        allowed = ("key_cert_sign", "crl_sign") if ca else ("digital_signature",)
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(by)
            .public_key(own.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=30))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
            .add_extension(x509.KeyUsage(**{use: use in allowed for use in usages}), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(own.public_key()), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(signed_by.public_key()), critical=False
            )
        )
        if not ca:
            purpose = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION])
            builder = builder.add_extension(purpose, critical=False)
        return builder.sign(signed_by, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    root = certificate("a root", root_key, "a root", root_key, ca=True)
    leaf = certificate("a leaf", key, "a root", root_key, ca=False)
    alone = certificate("alone", key, "alone", key, ca=False)
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    for name, data in zip(NAMES, (root, leaf + root, secret, alone), strict=True):
        (folder / name).write_bytes(data)
    return [folder / name for name in NAMES]
