package keystore

import (
	"bytes"
	"crypto"
	"crypto/x509"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/entente-mesh/entente/internal/pemfile"
)

// credentialsDirectory is where systemd puts a service's credentials (systemd.exec(5)).
const credentialsDirectory = "CREDENTIALS_DIRECTORY"

// credentialPath is the file of a systemd credential of this service.
func credentialPath(name string) (string, error) {
	if name == "" || name == "." || name == ".." || strings.ContainsAny(name, "/\x00") || len(name) > 255 {
		return "", fmt.Errorf("%q is no name of a systemd credential", name)
	}
	dir := os.Getenv(credentialsDirectory)
	if dir == "" {
		return "", fmt.Errorf("systemd gave this process no credentials: the unit needs LoadCredentialEncrypted=%s:FILE (systemd-creds encrypt makes the file); outside of the unit: systemd-run --pty --wait -p LoadCredentialEncrypted=%s:FILE entente …", name, name)
	}
	path := filepath.Join(dir, name)
	if _, err := os.Stat(path); err != nil {
		return "", fmt.Errorf("systemd gave this process no credential %q: the unit needs LoadCredentialEncrypted=%s:FILE: %w", name, name, err)
	}
	return path, nil
}

// readSecret reads a file that nobody else may read. others are the mode bits that give
// it to somebody else.
func readSecret(path string, others os.FileMode, most int64) ([]byte, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if mode := info.Mode().Perm(); mode&others != 0 {
		return nil, fmt.Errorf("%s has mode %#o, others may read it; run: chmod 600 %s", path, mode, path)
	}
	if info.Size() > most {
		return nil, fmt.Errorf("%s has %d bytes, at most %d are allowed", path, info.Size(), most)
	}
	return os.ReadFile(path)
}

const (
	ownerOnly = 0o077
	// A credential's mode shows the service's own right, an access list, as the group's.
	credentialOnly = 0o027
)

// ReadCredential reads a systemd credential of this service.
func ReadCredential(name string) ([]byte, error) {
	path, err := credentialPath(name)
	if err != nil {
		return nil, err
	}
	return readSecret(path, credentialOnly, maxFileSize)
}

// parsePEM reads a private key: PKCS#8, or the older forms of EC and RSA keys.
func parsePEM(text []byte) (crypto.Signer, error) {
	block, err := pemfile.PrivateKey(text)
	if err != nil {
		return nil, err
	}
	defer clear(block.Bytes)
	switch block.Type {
	case "EC PRIVATE KEY":
		if key, err := x509.ParseECPrivateKey(block.Bytes); err == nil {
			return key, nil
		}
	case "RSA PRIVATE KEY":
		if key, err := x509.ParsePKCS1PrivateKey(block.Bytes); err == nil {
			return key, nil
		}
	case "PRIVATE KEY":
		return parse(block.Bytes)
	case "ENCRYPTED PRIVATE KEY":
		return nil, errors.New("the key is encrypted in a form that is not read here: decrypt it, seal it with `entente ca seal`, and destroy the plain one")
	}
	return nil, fmt.Errorf("the PEM block %.40q holds no key that is read here", block.Type)
}

// CredentialKey is a private key, PEM, that systemd keeps sealed.
func CredentialKey(name string) (crypto.Signer, error) {
	text, err := ReadCredential(name)
	if err != nil {
		return nil, err
	}
	defer clear(text)
	return parsePEM(text)
}

// SealKey seals a private key, PEM, under a name.
func SealKey(sealer Sealer, name string, text []byte) ([]byte, error) {
	key, err := parsePEM(text)
	if err != nil {
		return nil, err
	}
	plain, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	defer clear(plain)
	return sealer.Seal(name, plain)
}

// LoadKey reads a file that SealKey made; with plainToo also one in PEM.
func LoadKey(path string, sealer Sealer, name string, plainToo bool) (crypto.Signer, error) {
	data, err := readSecret(path, ownerOnly, maxFileSize)
	if err != nil {
		return nil, err
	}
	defer clear(data)
	if bytes.Contains(data, []byte("-----BEGIN ")) {
		if !plainToo {
			return nil, fmt.Errorf("%s is not sealed, and plain keys are for insecureDev only; run: entente ca seal --config ca.yaml %s", path, path)
		}
		return parsePEM(data)
	}
	plain, err := sealer.Unseal(name, data)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	defer clear(plain)
	return parse(plain)
}
