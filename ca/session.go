package ca

import (
	"crypto"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"strconv"
	"time"
)

// sessionContext keeps a signature over a session from meaning anything elsewhere: no
// TLS message that the same key signs begins like it.
const sessionContext = "entente session v1\x00"

// Session is what a subscriber signs when it opens a stream. Without that signature a CA
// node could say of any subscriber that it has a later session there.
type Session struct {
	Cluster    []byte
	Subscriber string // Origin.Subscriber of its SVID
	BootID     string
	Connect    uint64
	NodeID     string // of the CA node at the other end
}

// Subscriber names who holds an SVID among those that follow Sync: an agent by its name,
// another by its entry and host, since one entry may stand on several hosts. Names of
// agents hold no slash, ids of entries do.
func (o Origin) Subscriber() string {
	if o.Entry == "" {
		return o.Agent
	}
	return o.Entry + "@" + o.Agent
}

// bootTime is how many characters of a boot id tell when the process started, after a "t".
const bootTime = 16

// NewBootID names the start of a subscriber's process. The subscriber signs it, so that who
// holds an earlier start's Hello back cannot pass it off as a later one (EarlierBoot).
func NewBootID(started time.Time, random [8]byte) string {
	return fmt.Sprintf("t%0*x%x", bootTime, max(started.UnixNano(), 0), random)
}

// EarlierBoot reports whether a boot is known to be earlier than another one of the same
// host, by that host's clock. Ids of the release before are random and tell nothing.
func EarlierBoot(x, y string) bool {
	at, before := startOf(x)
	than, after := startOf(y)
	return before && after && at < than
}

func startOf(boot string) (at uint64, ok bool) {
	if len(boot) != 1+bootTime+16 || boot[0] != 't' {
		return 0, false
	}
	at, err := strconv.ParseUint(boot[1:1+bootTime], 16, 64)
	return at, err == nil
}

func (s Session) message() []byte {
	message := []byte(sessionContext)
	for _, field := range []string{string(s.Cluster), s.Subscriber, s.BootID, s.NodeID} {
		message = appendField(message, []byte(field))
	}
	return binary.BigEndian.AppendUint64(message, s.Connect)
}

// Sign proves the session with the key of the subscriber's SVID.
func (s Session) Sign(random io.Reader, key crypto.Signer) (publicKey, signature []byte, err error) {
	if publicKey, err = EncodeKey(key.Public()); err == nil {
		signature, err = signMessage(random, key, s.message())
	}
	if err != nil {
		return nil, nil, fmt.Errorf("sign the session: %w", err)
	}
	return publicKey, signature, nil
}

// maxSessionProof bounds a proof's key and its signature: an RSA key of 4096 bits fits.
const maxSessionProof = 1 << 10

// Verify returns the id of the key that signed the session. The caller decides whether
// that is the subscriber's.
func (s Session) Verify(publicKey, signature []byte) (keyID string, err error) {
	if len(publicKey) > maxSessionProof || len(signature) > maxSessionProof {
		return "", fmt.Errorf("the proof of a session has a key or a signature of over %d bytes", maxSessionProof)
	}
	key, _, err := publicOfSPKI(publicKey)
	if err != nil {
		return "", fmt.Errorf("the proof of a session: %w", err)
	}
	if !verifyMessage(key, s.message(), signature) {
		return "", errors.New("the proof of a session is not a signature over it")
	}
	return KeyID(publicKey), nil
}
