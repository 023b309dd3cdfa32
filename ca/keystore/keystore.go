// Package keystore keeps a CA node's private keys on its disk: each in a file of
// its own, sealed by what the operator chose, written whole or not at all.
//
// A key leaves the store only as a crypto.Signer inside this process (I1). No
// error and no log line of this package holds key material or a passphrase.
package keystore

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// Sealer turns a key into what may lie on a disk, and back. The name of the key
// is bound to the sealed form, so that one file cannot be put in another's place.
// Safe for concurrent use.
type Sealer interface {
	Seal(name string, plain []byte) ([]byte, error)
	Unseal(name string, sealed []byte) ([]byte, error)
}

// ErrNoKey: the store has no key of that name.
var ErrNoKey = errors.New("no such key")

const (
	suffix      = ".key"
	maxFileSize = 16 << 10
	maxName     = 100
)

// Store is one directory of keys. It is safe for concurrent use by one process;
// two processes must not share a directory.
type Store struct {
	dir    string
	sealer Sealer
}

// Open opens dir, which is made with mode 0700 if it is not there.
func Open(dir string, sealer Sealer) (*Store, error) {
	if sealer == nil {
		return nil, errors.New("open key store: no way of sealing keys was given")
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("open key store: %w", err)
	}
	info, err := os.Stat(dir)
	if err != nil {
		return nil, fmt.Errorf("open key store: %w", err)
	}
	if mode := info.Mode().Perm(); mode&0o077 != 0 {
		return nil, fmt.Errorf("open key store: %s has mode %#o, others may enter it; run: chmod 700 %s", dir, mode, dir)
	}
	return &Store{dir: dir, sealer: sealer}, nil
}

// Create makes a P-256 key under a name that is not in use, and returns it once
// it is safely on the disk.
func (s *Store) Create(name string) (crypto.Signer, error) {
	return s.create(name, func() (crypto.Signer, error) { return ecdsa.GenerateKey(elliptic.P256(), rand.Reader) })
}

// CreateRSA is Create with an RSA key of 2048 bits, for tokens whose verifiers know
// nothing else.
func (s *Store) CreateRSA(name string) (crypto.Signer, error) {
	return s.create(name, func() (crypto.Signer, error) { return rsa.GenerateKey(rand.Reader, 2048) })
}

func (s *Store) create(name string, generate func() (crypto.Signer, error)) (crypto.Signer, error) {
	path, err := s.path(name)
	if err != nil {
		return nil, err
	}
	if _, err := os.Lstat(path); err == nil {
		return nil, fmt.Errorf("create key %q: %s exists", name, path)
	}
	key, err := generate()
	if err != nil {
		return nil, fmt.Errorf("create key %q: %w", name, err)
	}
	plain, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, fmt.Errorf("create key %q: %w", name, err)
	}
	sealed, err := s.sealer.Seal(name, plain)
	clear(plain)
	if err != nil {
		return nil, fmt.Errorf("create key %q: %w", name, err)
	}
	if err := writeFile(path, sealed); err != nil {
		return nil, fmt.Errorf("create key %q: %w", name, err)
	}
	return key, nil
}

// Load returns the key of that name, or an error that is ErrNoKey.
func (s *Store) Load(name string) (crypto.Signer, error) {
	path, err := s.path(name)
	if err != nil {
		return nil, err
	}
	sealed, err := readFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("load key %q from %s: %w", name, s.dir, ErrNoKey)
	}
	if err != nil {
		return nil, fmt.Errorf("load key %q: %w", name, err)
	}
	plain, err := s.sealer.Unseal(name, sealed)
	if err != nil {
		return nil, fmt.Errorf("load key %q from %s: %w", name, path, err)
	}
	defer clear(plain)
	key, err := parse(plain)
	if err != nil {
		return nil, fmt.Errorf("load key %q from %s: %w", name, path, err)
	}
	return key, nil
}

// LoadOrCreate returns the key of that name and makes it first if need be.
func (s *Store) LoadOrCreate(name string) (crypto.Signer, error) {
	key, err := s.Load(name)
	if errors.Is(err, ErrNoKey) {
		return s.Create(name)
	}
	return key, err
}

// Delete removes a key. One that is not there is no error.
func (s *Store) Delete(name string) error {
	path, err := s.path(name)
	if err != nil {
		return err
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("delete key %q: %w", name, err)
	}
	return syncDir(s.dir)
}

// Names lists the keys in the store, sorted.
func (s *Store) Names() ([]string, error) {
	files, err := os.ReadDir(s.dir)
	if err != nil {
		return nil, fmt.Errorf("list keys: %w", err)
	}
	var names []string
	for _, file := range files {
		if name, ok := strings.CutSuffix(file.Name(), suffix); ok && checkName(name) == nil {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names, nil
}

func (s *Store) path(name string) (string, error) {
	if err := checkName(name); err != nil {
		return "", err
	}
	return filepath.Join(s.dir, name+suffix), nil
}

// checkName allows what can never leave the directory or hide in it.
func checkName(name string) error {
	ok := name != "" && len(name) <= maxName
	for _, c := range []byte(name) {
		ok = ok && (c >= 'a' && c <= 'z' || c >= '0' && c <= '9' || c == '-')
	}
	if !ok {
		return fmt.Errorf("key name %q: must be 1 to %d of a-z, 0-9 and -", name, maxName)
	}
	return nil
}

func parse(plain []byte) (crypto.Signer, error) {
	key, err := x509.ParsePKCS8PrivateKey(plain)
	if err != nil {
		// The parser's own words may quote what it read.
		return nil, errors.New("the file holds no PKCS#8 private key")
	}
	signer, ok := key.(crypto.Signer)
	if !ok {
		return nil, fmt.Errorf("the key is a %T, which cannot sign", key)
	}
	return signer, nil
}

func readFile(path string) ([]byte, error) {
	file, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	info, err := file.Stat()
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%s is not a regular file", path)
	}
	if mode := info.Mode().Perm(); mode&0o077 != 0 {
		return nil, fmt.Errorf("%s has mode %#o, others may use it; run: chmod 600 %s", path, mode, path)
	}
	if info.Size() > maxFileSize {
		return nil, fmt.Errorf("%s has %d bytes, a key file has at most %d", path, info.Size(), maxFileSize)
	}
	data := make([]byte, info.Size())
	if _, err := file.ReadAt(data, 0); err != nil {
		return nil, fmt.Errorf("read %s: %w", path, err)
	}
	return data, nil
}

// writeFile makes path appear with all of data in it, or not at all, also when
// the machine stops in between.
func writeFile(path string, data []byte) (err error) {
	dir := filepath.Dir(path)
	file, err := os.CreateTemp(dir, ".new-*") // mode 0600
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			os.Remove(file.Name())
		}
	}()
	_, err = file.Write(data)
	if err == nil {
		err = file.Sync()
	}
	if closeErr := file.Close(); err == nil {
		err = closeErr
	}
	if err != nil {
		return err
	}
	// Link, not rename: a key that is already there is never written over.
	if err := os.Link(file.Name(), path); err != nil {
		return err
	}
	if err := os.Remove(file.Name()); err != nil {
		return err
	}
	return syncDir(dir)
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}
