package ca

import (
	"crypto"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
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
