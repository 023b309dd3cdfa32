package keystore

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/pbkdf2"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/entente-mesh/entente/internal/secret"
)

// A sealed file is
//
//	"entente-key" 0x00 version(1) iterations(4, big endian)
//	passphraseSalt(16) keySalt(32) nonce(12) ciphertext+tag
//
// The key of the file is HKDF-SHA256 over keySalt of the PBKDF2-SHA256 of the
// passphrase over passphraseSalt; the cipher is AES-256-GCM. Everything before
// the ciphertext, and the key's name, is authenticated with it.
//
// Deriving from the passphrase is slow on purpose, so files share
// passphraseSalt where they can: one derivation opens them all.
const (
	magic         = "entente-key\x00"
	version       = 1
	iterationsNow = 600_000
	// A file that states fewer was not written by us; one that states more would
	// keep us busy for minutes.
	iterationsMin = 100_000
	iterationsMax = 10_000_000

	passphraseSaltLen = 16
	keySaltLen        = 32
	nonceLen          = 12
	headerLen         = len(magic) + 1 + 4 + passphraseSaltLen + keySaltLen + nonceLen

	plainMagic = "entente-insecure-key\x00"

	minPassphrase = 12
	maxPassphrase = 4 << 10
)

var (
	errWrongPassphrase = errors.New("the passphrase does not open this file, or the file was changed or renamed")
	errNotSealed       = errors.New("the file is not sealed: it was written with insecureDev; a node that is not for development must be set up anew")
	errSealed          = errors.New("the file is sealed; set keys.passphraseFile or keys.systemdCredential in place of keys.insecureDev")
	errNoKeyFile       = errors.New("the file is not a key file of ours, or it is cut short")
)

type passphraseSealer struct {
	passphrase secret.Text
	iterations uint32

	mu      sync.Mutex
	derived map[derivation][]byte
	last    derivation // what new files use; zero: none yet
}

type derivation struct {
	salt       [passphraseSaltLen]byte
	iterations uint32
}

// PassphraseFile seals with the passphrase in the file at path, which must be
// readable by its owner only and hold 12 characters to 4 KiB; line ends at its end
// do not count.
func PassphraseFile(path string) (Sealer, error) {
	data, err := readSecret(path, ownerOnly, maxPassphrase)
	if err != nil {
		return nil, fmt.Errorf("passphrase: %w", err)
	}
	return sealWith(data, path)
}

// Credential seals with the passphrase in a systemd credential of this service, of the
// same form.
func Credential(name string) (Sealer, error) {
	data, err := ReadCredential(name)
	if err != nil {
		return nil, fmt.Errorf("passphrase: %w", err)
	}
	return sealWith(data, "credential "+name)
}

func sealWith(data []byte, from string) (Sealer, error) {
	phrase := string(bytes.TrimRight(data, "\r\n"))
	clear(data)
	if n := len(phrase); n < minPassphrase || n > maxPassphrase {
		return nil, fmt.Errorf("passphrase: %s holds %d characters, not %d to %d; for example: openssl rand -base64 32", from, n, minPassphrase, maxPassphrase)
	}
	return &passphraseSealer{passphrase: secret.Of(phrase), iterations: iterationsNow, derived: make(map[derivation][]byte)}, nil
}

// Format shows neither the passphrase nor what was derived from it.
func (p *passphraseSealer) Format(f fmt.State, _ rune) {
	io.WriteString(f, "passphrase "+secret.Redacted)
}

func (p *passphraseSealer) Seal(name string, plain []byte) ([]byte, error) {
	header := make([]byte, 0, headerLen)
	header = append(header, magic...)
	header = append(header, version)

	p.mu.Lock()
	d := p.last
	if d == (derivation{}) || d.iterations < p.iterations {
		d = derivation{iterations: p.iterations}
		rand.Read(d.salt[:])
	}
	root, err := p.derive(d)
	p.mu.Unlock()
	if err != nil {
		return nil, err
	}

	header = binary.BigEndian.AppendUint32(header, d.iterations)
	header = append(header, d.salt[:]...)
	fresh := make([]byte, keySaltLen+nonceLen)
	rand.Read(fresh)
	header = append(header, fresh...)

	aead, err := fileKey(root, fresh[:keySaltLen])
	if err != nil {
		return nil, err
	}
	return aead.Seal(header, fresh[keySaltLen:], plain, boundTo(name, header)), nil
}

func (p *passphraseSealer) Unseal(name string, sealed []byte) ([]byte, error) {
	if bytes.HasPrefix(sealed, []byte(plainMagic)) {
		return nil, errNotSealed
	}
	if len(sealed) < headerLen || !bytes.HasPrefix(sealed, []byte(magic)) {
		return nil, errNoKeyFile
	}
	header, rest := sealed[:headerLen], sealed[len(magic):]
	if rest[0] != version {
		return nil, fmt.Errorf("the file has format %d, this release reads %d", rest[0], version)
	}
	d := derivation{iterations: binary.BigEndian.Uint32(rest[1:5])}
	if d.iterations < iterationsMin || d.iterations > iterationsMax {
		return nil, fmt.Errorf("the file states %d PBKDF2 iterations, outside of %d to %d", d.iterations, iterationsMin, iterationsMax)
	}
	rest = rest[5:]
	copy(d.salt[:], rest)
	keySalt := rest[passphraseSaltLen : passphraseSaltLen+keySaltLen]
	nonce := rest[passphraseSaltLen+keySaltLen : passphraseSaltLen+keySaltLen+nonceLen]

	p.mu.Lock()
	defer p.mu.Unlock()
	_, known := p.derived[d]
	root, err := p.derive(d)
	if err != nil {
		return nil, err
	}
	aead, err := fileKey(root, keySalt)
	if err != nil {
		return nil, err
	}
	plain, err := aead.Open(nil, nonce, sealed[headerLen:], boundTo(name, header))
	if err != nil {
		if !known {
			delete(p.derived, d) // what does not open anything is not kept
			if p.last == d {
				p.last = derivation{}
			}
		}
		return nil, errWrongPassphrase
	}
	return plain, nil
}

// derive is called with mu held: two callers never derive the same at once.
func (p *passphraseSealer) derive(d derivation) ([]byte, error) {
	if root, ok := p.derived[d]; ok {
		return root, nil
	}
	root, err := pbkdf2.Key(sha256.New, p.passphrase.Reveal(), d.salt[:], int(d.iterations), 32)
	if err != nil {
		return nil, fmt.Errorf("derive from passphrase: %w", err)
	}
	p.derived[d] = root
	p.last = d
	return root, nil
}

func fileKey(root, salt []byte) (cipher.AEAD, error) {
	key, err := hkdf.Key(sha256.New, root, salt, "entente key file v1", 32)
	if err != nil {
		return nil, err
	}
	defer clear(key)
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, err
	}
	return cipher.NewGCM(block)
}

// boundTo is the additional data: the header, then the name. The header has a
// fixed length, so no two pairs give the same bytes.
func boundTo(name string, header []byte) []byte {
	return append(bytes.Clone(header), name...)
}

type plainSealer struct{}

// Plain does not seal: keys lie on the disk as they are, mode 0600. For
// development only (keys.insecureDev).
func Plain() Sealer { return plainSealer{} }

func (plainSealer) Seal(name string, plain []byte) ([]byte, error) {
	return append([]byte(plainMagic), plain...), nil
}

func (plainSealer) Unseal(name string, sealed []byte) ([]byte, error) {
	if bytes.HasPrefix(sealed, []byte(magic)) {
		return nil, errSealed
	}
	plain, ok := bytes.CutPrefix(sealed, []byte(plainMagic))
	if !ok {
		return nil, errNoKeyFile
	}
	return bytes.Clone(plain), nil
}
