//go:build pkcs11

package keystore

import (
	"bytes"
	"cmp"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/asn1"
	"errors"
	"fmt"
	"io"
	"math/big"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/miekg/pkcs11"

	"github.com/entente-mesh/entente/internal/secret"
)

// PKCS11 tells whether this binary was built with PKCS#11.
const PKCS11 = true

const (
	maxSessions = 8 // signatures at once; tokens allow few, and each takes a core of theirs
	maxPIN      = 256
	sessionWait = 5 * time.Second
	reopenAfter = time.Second // between attempts at a token that was lost
)

// Token keeps keys in a PKCS#11 token: they are made there and never leave it. A key is
// found again by its label. Sessions are pooled; when the token was lost they are opened
// anew, at the next signature, for as long as it takes. Safe for concurrent use; other
// processes may use the same token under other labels.
type Token struct {
	config TokenConfig
	pin    secret.Text
	module *pkcs11.Ctx

	mu      sync.Mutex
	open    *sessions // nil: lost
	last    *sessions // open, or what it was
	lost    error     // why it could not be opened again
	at      time.Time // of that
	stopped error     // why it is not tried any more
}

// sessions is one login.
type sessions struct {
	slot    uint
	count   int
	free    chan pkcs11.SessionHandle
	mu      sync.Mutex
	handles map[string]pkcs11.ObjectHandle // of private keys, by label
}

// OpenToken opens the module and logs in to the token.
func OpenToken(config TokenConfig) (*Token, error) {
	pin, err := config.readPIN()
	if err != nil {
		return nil, fmt.Errorf("PIN of the PKCS#11 token: %w", err)
	}
	module := pkcs11.New(config.Module)
	if module == nil {
		return nil, fmt.Errorf("open PKCS#11 token %q: %s is no PKCS#11 module that can be loaded here: install the vendor's library, for this architecture", config.Token, config.Module)
	}
	t := &Token{config: config, pin: secret.Of(pin), module: module}
	if err := t.initialize(); err != nil {
		return nil, t.failed(err)
	}
	if t.open, err = t.login(); err != nil {
		return nil, t.failed(err)
	}
	t.last = t.open
	return t, nil
}

func (c TokenConfig) readPIN() (string, error) {
	var data []byte
	var err error
	if c.PINCredential != "" {
		data, err = ReadCredential(c.PINCredential)
	} else {
		data, err = readSecret(c.PINFile, ownerOnly, maxPIN)
	}
	if err != nil {
		return "", err
	}
	defer clear(data)
	pin := string(bytes.TrimRight(data, "\r\n"))
	if pin == "" || len(pin) > maxPIN {
		return "", errors.New("it is empty, or too long")
	}
	return pin, nil
}

// Close ends all sessions. Keys of this token cannot sign any more.
func (t *Token) Close() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.open, t.stopped = nil, errors.New("it was closed")
	return t.module.Finalize()
}

func (t *Token) failed(err error) error {
	return fmt.Errorf("PKCS#11 token %q (module %s): %w", t.config.Token, t.config.Module, err)
}

func (t *Token) initialize() error {
	if err := t.module.Initialize(); err != nil && !is(err, pkcs11.CKR_CRYPTOKI_ALREADY_INITIALIZED) {
		return fmt.Errorf("the module does not start: %w", err)
	}
	return nil
}

func is(err error, codes ...uint) bool {
	var code pkcs11.Error
	return errors.As(err, &code) && slices.Contains(codes, uint(code))
}

// login finds the token and opens its sessions.
func (t *Token) login() (_ *sessions, err error) {
	slots, err := t.module.GetSlotList(true)
	if err != nil {
		return nil, fmt.Errorf("its slots cannot be listed: %w", err)
	}
	var found []uint
	var info pkcs11.TokenInfo
	for _, slot := range slots {
		if in, err := t.module.GetTokenInfo(slot); err == nil && in.Label == t.config.Token {
			found, info = append(found, slot), in
		}
	}
	switch {
	case len(found) == 0:
		return nil, errors.New("no slot holds a token of that label: is it plugged in, is its service running, may this user reach it?")
	case len(found) > 1:
		return nil, fmt.Errorf("%d slots hold a token of that label: give each its own", len(found))
	}
	n := uint(maxSessions)
	if most := info.MaxRwSessionCount; most != pkcs11.CK_EFFECTIVELY_INFINITE && most != pkcs11.CK_UNAVAILABLE_INFORMATION {
		n = max(1, min(n, most))
	}
	s := &sessions{slot: found[0], free: make(chan pkcs11.SessionHandle, n), handles: make(map[string]pkcs11.ObjectHandle)}
	defer func() {
		if err != nil {
			t.module.CloseAllSessions(s.slot)
		}
	}()
	for i := range n {
		session, err := t.module.OpenSession(s.slot, pkcs11.CKF_SERIAL_SESSION|pkcs11.CKF_RW_SESSION)
		if err != nil {
			if i > 0 && is(err, pkcs11.CKR_SESSION_COUNT) {
				break // others use it, too
			}
			return nil, fmt.Errorf("no session can be opened: %w", err)
		}
		if i == 0 { // one login is for all sessions
			err := t.module.Login(session, pkcs11.CKU_USER, t.pin.Reveal())
			if is(err, pkcs11.CKR_PIN_INCORRECT, pkcs11.CKR_PIN_LOCKED, pkcs11.CKR_PIN_EXPIRED, pkcs11.CKR_PIN_LEN_RANGE) {
				// A second attempt may be the one that locks the token.
				t.stopped = fmt.Errorf("it refuses the PIN: %w; it is not tried again: set the right one and restart", err)
				return nil, t.stopped
			}
			if err != nil && !is(err, pkcs11.CKR_USER_ALREADY_LOGGED_IN) {
				return nil, fmt.Errorf("login: %w", err)
			}
		}
		s.free <- session
		s.count++
	}
	return s, nil
}

// lostCodes are what a module answers when the token, or what was opened of it, is gone.
var lostCodes = []uint{
	pkcs11.CKR_SESSION_HANDLE_INVALID, pkcs11.CKR_SESSION_CLOSED, pkcs11.CKR_USER_NOT_LOGGED_IN, pkcs11.CKR_DEVICE_ERROR,
	pkcs11.CKR_DEVICE_REMOVED, pkcs11.CKR_TOKEN_NOT_PRESENT, pkcs11.CKR_TOKEN_NOT_RECOGNIZED, pkcs11.CKR_SLOT_ID_INVALID,
	pkcs11.CKR_CRYPTOKI_NOT_INITIALIZED, pkcs11.CKR_KEY_HANDLE_INVALID, pkcs11.CKR_OBJECT_HANDLE_INVALID,
	pkcs11.CKR_GENERAL_ERROR, pkcs11.CKR_FUNCTION_FAILED, pkcs11.CKR_OPERATION_ACTIVE,
}

// do calls f with a session; a second time with a new one if the first was lost.
func (t *Token) do(f func(*sessions, pkcs11.SessionHandle) error) error {
	var lost *sessions
	for {
		s, err := t.current(lost)
		if err != nil {
			return t.failed(err)
		}
		var session pkcs11.SessionHandle
		select {
		case session = <-s.free:
		case <-time.After(sessionWait):
			return t.failed(fmt.Errorf("no session became free in %v", sessionWait))
		}
		err = f(s, session)
		gone := is(err, lostCodes...) || errors.Is(err, ErrNoKey) && !t.loggedIn(session)
		s.free <- session
		switch {
		case err == nil:
			return nil
		case lost != nil || !gone:
			return t.failed(err)
		}
		lost = s
	}
}

// loggedIn: who is not sees no private keys, and no error.
func (t *Token) loggedIn(session pkcs11.SessionHandle) bool {
	info, err := t.module.GetSessionInfo(session)
	return err == nil && info.State == pkcs11.CKS_RW_USER_FUNCTIONS
}

// current returns sessions that are not the lost ones.
func (t *Token) current(lost *sessions) (*sessions, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.open != nil && t.open == lost {
		t.open = nil
		t.module.CloseAllSessions(lost.slot)
	}
	switch {
	case t.stopped != nil:
		return nil, t.stopped
	case t.open != nil:
		return t.open, nil
	case time.Since(t.at) < reopenAfter:
		return nil, t.lost
	}
	s, err := t.login()
	if err != nil && t.stopped == nil && len(t.last.free) == t.last.count {
		// Some modules find a token again only from the start. Nobody is in a call now.
		t.module.Finalize()
		if err = t.initialize(); err == nil {
			s, err = t.login()
		}
	}
	if err != nil {
		if t.stopped == nil {
			err = fmt.Errorf("it is lost, and tried again every second: %w", err)
		}
		t.lost, t.at = err, time.Now()
		return nil, err
	}
	t.open, t.last = s, s
	return s, nil
}

func (t *Token) label(name string) string { return t.config.Label + "/" + name }

// find returns the objects of a class with that label; an empty one: with any.
func (t *Token) find(session pkcs11.SessionHandle, class uint, label string) (objects []pkcs11.ObjectHandle, err error) {
	wanted := []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_CLASS, class), pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true)}
	if label != "" {
		wanted = append(wanted, pkcs11.NewAttribute(pkcs11.CKA_LABEL, label))
	}
	if err := t.module.FindObjectsInit(session, wanted); err != nil {
		return nil, err
	}
	defer func() {
		if e := t.module.FindObjectsFinal(session); err == nil {
			err = e
		}
	}()
	for {
		some, _, err := t.module.FindObjects(session, 64)
		if err != nil || len(some) == 0 {
			return objects, err
		}
		objects = append(objects, some...)
	}
}

// one is the only object of a class with that label.
func (t *Token) one(session pkcs11.SessionHandle, class uint, label string) (pkcs11.ObjectHandle, error) {
	objects, err := t.find(session, class, label)
	switch {
	case err != nil:
		return 0, err
	case len(objects) == 0:
		return 0, fmt.Errorf("label %s: %w", label, ErrNoKey)
	case len(objects) > 1:
		return 0, fmt.Errorf("%d keys have the label %s: two nodes must not share labels (keys.pkcs11.label)", len(objects), label)
	}
	return objects[0], nil
}

// Create makes a P-256 key under a name that is not in use.
func (t *Token) Create(name string) (crypto.Signer, error) {
	p256, err := asn1.Marshal(asn1.ObjectIdentifier{1, 2, 840, 10045, 3, 1, 7})
	if err != nil {
		return nil, err
	}
	return t.create(name, pkcs11.CKM_EC_KEY_PAIR_GEN, pkcs11.CKK_EC, pkcs11.NewAttribute(pkcs11.CKA_EC_PARAMS, p256))
}

// CreateRSA is Create with an RSA key of 2048 bits.
func (t *Token) CreateRSA(name string) (crypto.Signer, error) {
	return t.create(name, pkcs11.CKM_RSA_PKCS_KEY_PAIR_GEN, pkcs11.CKK_RSA,
		pkcs11.NewAttribute(pkcs11.CKA_MODULUS_BITS, 2048), pkcs11.NewAttribute(pkcs11.CKA_PUBLIC_EXPONENT, []byte{1, 0, 1}))
}

func (t *Token) create(name string, mechanism, kind uint, parameters ...*pkcs11.Attribute) (key crypto.Signer, err error) {
	if err := checkName(name); err != nil {
		return nil, err
	}
	label := t.label(name)
	id := sha256.Sum256([]byte(label))
	both := []*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true), pkcs11.NewAttribute(pkcs11.CKA_KEY_TYPE, kind),
		pkcs11.NewAttribute(pkcs11.CKA_LABEL, label), pkcs11.NewAttribute(pkcs11.CKA_ID, id[:20]),
	}
	public := append(slices.Concat(both, parameters), pkcs11.NewAttribute(pkcs11.CKA_VERIFY, true))
	private := append(slices.Clone(both), pkcs11.NewAttribute(pkcs11.CKA_SIGN, true), pkcs11.NewAttribute(pkcs11.CKA_PRIVATE, true),
		pkcs11.NewAttribute(pkcs11.CKA_SENSITIVE, true), pkcs11.NewAttribute(pkcs11.CKA_EXTRACTABLE, false))
	err = t.do(func(s *sessions, session pkcs11.SessionHandle) error {
		if have, err := t.find(session, pkcs11.CKO_PRIVATE_KEY, label); err != nil || len(have) > 0 {
			return cmp.Or(err, fmt.Errorf("the token has a key %s", label))
		}
		_, _, err := t.module.GenerateKeyPair(session, []*pkcs11.Mechanism{pkcs11.NewMechanism(mechanism, nil)}, public, private)
		if err == nil {
			key, err = t.read(session, label)
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("create key %q: %w", name, err)
	}
	return key, nil
}

// Load returns the key of that name, or an error that is ErrNoKey.
func (t *Token) Load(name string) (key crypto.Signer, err error) {
	if err := checkName(name); err != nil {
		return nil, err
	}
	err = t.do(func(_ *sessions, session pkcs11.SessionHandle) error {
		key, err = t.read(session, t.label(name))
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("load key %q: %w", name, err)
	}
	return key, nil
}

// LoadOrCreate returns the key of that name and makes it first if need be.
func (t *Token) LoadOrCreate(name string) (crypto.Signer, error) {
	key, err := t.Load(name)
	if errors.Is(err, ErrNoKey) {
		return t.Create(name)
	}
	return key, err
}

// read makes a signer of a key pair, after seeing that the private half cannot leave.
func (t *Token) read(session pkcs11.SessionHandle, label string) (crypto.Signer, error) {
	private, err := t.one(session, pkcs11.CKO_PRIVATE_KEY, label)
	if err != nil {
		return nil, err
	}
	rights, err := t.module.GetAttributeValue(session, private, []*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_SENSITIVE, nil), pkcs11.NewAttribute(pkcs11.CKA_EXTRACTABLE, nil), pkcs11.NewAttribute(pkcs11.CKA_NEVER_EXTRACTABLE, nil),
	})
	if err != nil {
		return nil, err
	}
	yes := func(i int) bool { return len(rights[i].Value) == 1 && rights[i].Value[0] == 1 }
	if !yes(0) || yes(1) || !yes(2) {
		return nil, fmt.Errorf("key %s was not made in the token, or may leave it: delete it, the node makes its own", label)
	}
	object, err := t.one(session, pkcs11.CKO_PUBLIC_KEY, label)
	if err != nil {
		return nil, err
	}
	kind, err := t.module.GetAttributeValue(session, object, []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_KEY_TYPE, nil)})
	if err != nil {
		return nil, err
	}
	key := &tokenKey{token: t, label: label}
	if number(kind[0].Value) == pkcs11.CKK_EC {
		key.public, err = t.ecPublic(session, object)
	} else {
		key.public, err = t.rsaPublic(session, object)
	}
	if err != nil {
		return nil, fmt.Errorf("key %s: %w", label, err)
	}
	return key, nil
}

// number reads a CK_ULONG, which has the machine's size and byte order; kinds of keys
// fit into its lowest byte, the others are zero.
func number(value []byte) uint {
	for _, b := range value {
		if b != 0 {
			return uint(b)
		}
	}
	return 0
}

func (t *Token) ecPublic(session pkcs11.SessionHandle, object pkcs11.ObjectHandle) (*ecdsa.PublicKey, error) {
	point, err := t.module.GetAttributeValue(session, object, []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_EC_POINT, nil)})
	if err != nil {
		return nil, err
	}
	raw := point[0].Value
	var inner []byte // as the standard says; some tokens leave the wrapping out
	if rest, err := asn1.Unmarshal(raw, &inner); err == nil && len(rest) == 0 {
		raw = inner
	}
	public, err := ecdsa.ParseUncompressedPublicKey(elliptic.P256(), raw)
	if err != nil {
		return nil, errors.New("it is no point on P-256")
	}
	return public, nil
}

func (t *Token) rsaPublic(session pkcs11.SessionHandle, object pkcs11.ObjectHandle) (*rsa.PublicKey, error) {
	parts, err := t.module.GetAttributeValue(session, object, []*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_MODULUS, nil), pkcs11.NewAttribute(pkcs11.CKA_PUBLIC_EXPONENT, nil),
	})
	if err != nil {
		return nil, err
	}
	n, e := new(big.Int).SetBytes(parts[0].Value), new(big.Int).SetBytes(parts[1].Value)
	if n.BitLen() < 2048 || n.BitLen() > 4096 || !e.IsInt64() || e.Int64() < 3 || e.Int64() > 1<<31-1 {
		return nil, errors.New("it is neither on P-256 nor an RSA key of 2048 to 4096 bits")
	}
	return &rsa.PublicKey{N: n, E: int(e.Int64())}, nil
}

// Delete removes a key. One that is not there is no error.
func (t *Token) Delete(name string) error {
	if err := checkName(name); err != nil {
		return err
	}
	label := t.label(name)
	err := t.do(func(s *sessions, session pkcs11.SessionHandle) error {
		s.mu.Lock()
		delete(s.handles, label)
		s.mu.Unlock()
		for _, class := range []uint{pkcs11.CKO_PRIVATE_KEY, pkcs11.CKO_PUBLIC_KEY} {
			objects, err := t.find(session, class, label)
			if err != nil {
				return err
			}
			for _, object := range objects {
				if err := t.module.DestroyObject(session, object); err != nil {
					return err
				}
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("delete key %q: %w", name, err)
	}
	return nil
}

// Names lists this node's keys, sorted.
func (t *Token) Names() (names []string, err error) {
	err = t.do(func(_ *sessions, session pkcs11.SessionHandle) error {
		names = nil
		objects, err := t.find(session, pkcs11.CKO_PRIVATE_KEY, "")
		if err != nil {
			return err
		}
		for _, object := range objects {
			label, err := t.module.GetAttributeValue(session, object, []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_LABEL, nil)})
			if err != nil {
				return err
			}
			if name, ok := strings.CutPrefix(string(label[0].Value), t.config.Label+"/"); ok && checkName(name) == nil {
				names = append(names, name)
			}
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("list keys: %w", err)
	}
	slices.Sort(names)
	return names, nil
}

// tokenKey signs in the token.
type tokenKey struct {
	token  *Token
	label  string
	public crypto.PublicKey
}

func (k *tokenKey) Public() crypto.PublicKey { return k.public }

// sha256Info stands before a SHA-256 digest in a PKCS #1 v1.5 signature (RFC 8017 9.2).
var sha256Info = []byte{0x30, 0x31, 0x30, 0x0d, 0x06, 0x09, 0x60, 0x86, 0x48, 0x01, 0x65, 0x03, 0x04, 0x02, 0x01, 0x05, 0x00, 0x04, 0x20}

// Sign signs a digest in the token, ECDSA or PKCS #1 v1.5. Each signature is verified
// before it is handed out: what left the token wrong, or was changed on the way, would
// reveal the key or be refused everywhere.
func (k *tokenKey) Sign(_ io.Reader, digest []byte, options crypto.SignerOpts) (signature []byte, err error) {
	mechanism, input := uint(pkcs11.CKM_ECDSA), digest[:min(len(digest), 32)]
	if _, isRSA := k.public.(*rsa.PublicKey); isRSA {
		if _, pss := options.(*rsa.PSSOptions); pss || options.HashFunc() != crypto.SHA256 || len(digest) != sha256.Size {
			return nil, errors.New("sign in the token: RSA keys sign SHA-256 digests by PKCS #1 v1.5 only")
		}
		mechanism, input = pkcs11.CKM_RSA_PKCS, slices.Concat(sha256Info, digest)
	}
	err = k.token.do(func(s *sessions, session pkcs11.SessionHandle) error {
		private, err := k.handle(s, session)
		if err != nil {
			return err
		}
		if err := k.token.module.SignInit(session, []*pkcs11.Mechanism{pkcs11.NewMechanism(mechanism, nil)}, private); err != nil {
			return err
		}
		signature, err = k.token.module.Sign(session, input)
		return err
	})
	if err == nil {
		signature, err = k.verified(digest, signature)
	}
	if err != nil {
		return nil, fmt.Errorf("sign with key %s: %w", k.label, err)
	}
	return signature, nil
}

// handle is the private key's in those sessions.
func (k *tokenKey) handle(s *sessions, session pkcs11.SessionHandle) (pkcs11.ObjectHandle, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if handle, ok := s.handles[k.label]; ok {
		return handle, nil
	}
	handle, err := k.token.one(session, pkcs11.CKO_PRIVATE_KEY, k.label)
	if err == nil {
		s.handles[k.label] = handle
	}
	return handle, err
}

// verified checks a fresh signature and gives it the form that crypto.Signer has.
func (k *tokenKey) verified(digest, signature []byte) ([]byte, error) {
	wrong := errors.New("the token gave a wrong signature: do not use it any further, and ask its vendor")
	switch public := k.public.(type) {
	case *rsa.PublicKey:
		if rsa.VerifyPKCS1v15(public, crypto.SHA256, digest, signature) != nil {
			return nil, wrong
		}
	case *ecdsa.PublicKey:
		if len(signature) != 64 {
			return nil, wrong
		}
		var err error
		rs := struct{ R, S *big.Int }{new(big.Int).SetBytes(signature[:32]), new(big.Int).SetBytes(signature[32:])}
		if signature, err = asn1.Marshal(rs); err != nil || !ecdsa.VerifyASN1(public, digest, signature) {
			return nil, wrong
		}
	}
	return signature, nil
}
