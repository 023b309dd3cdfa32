// Package domaintest makes what a state believes only with a signature: keys of nodes,
// and authorities that those nodes propose. For tests. The same names give the same
// bytes in every run.
package domaintest

import (
	"cmp"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/ca"
)

// keys are the keys by name and by id of everybody that a test has named.
var keys sync.Map

// Key is the key of a node or agent.
func Key(name string) *ecdsa.PrivateKey {
	if key, ok := keys.Load(name); ok {
		return key.(*ecdsa.PrivateKey)
	}
	sum := sha256.Sum256([]byte("key of " + name))
	key, err := ecdsa.ParseRawPrivateKey(elliptic.P256(), sum[:])
	if err != nil {
		panic(err)
	}
	keys.Store(name, key)
	keys.Store(ca.KeyID(SPKI(key)), key)
	return key
}

// SPKI is the key's SubjectPublicKeyInfo.
func SPKI(key *ecdsa.PrivateKey) []byte {
	spki, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		panic(err)
	}
	return spki
}

// KeyID is the id of the key with that name.
func KeyID(name string) string { return ca.KeyID(SPKI(Key(name))) }

// Authority is the record of a new key of a member: from a minute before now, for three
// phases. Only an X.509 one has a certificate, as much of one as Apply looks at.
func Authority(member, name, trustDomain string, use statev1.KeyUse, now time.Time, phase time.Duration) *statev1.Authority {
	public := SPKI(Key("authority " + name))
	a := &statev1.Authority{
		Id: ca.KeyID(public), MemberId: KeyID(member), Use: use,
		PublicKey: public, NotBefore: now.Add(-time.Minute).Unix(), NotAfter: now.Add(3 * phase).Unix(),
	}
	if use == statev1.KeyUse_KEY_USE_X509 {
		a.Certificate = Certificate(a, trustDomain, Key("authority "+name))
	}
	return a
}

// Prove signs, with the key of the name that Authority was given, that a JWT or WIT
// authority belongs to the trust domain.
func Prove(a *statev1.Authority, name, trustDomain string) *statev1.Authority {
	signature, err := ca.FixedSignature(sign(Key("authority "+name), ca.KeyProof(trustDomain, ca.ES256, a.GetUse(), a.GetId())))
	if err != nil {
		panic(err)
	}
	a.Proof = signature
	return a
}

// sign gives the same bytes each time.
func sign(key *ecdsa.PrivateKey, message []byte) []byte {
	sum := sha256.Sum256(message)
	signature, err := key.Sign(nil, sum[:], crypto.SHA256)
	if err != nil {
		panic(err)
	}
	return signature
}

// DER is one element.
func DER(tag byte, parts ...[]byte) []byte {
	content := slices.Concat(parts...)
	switch {
	case len(content) > 255:
		return slices.Concat([]byte{tag, 0x82, byte(len(content) >> 8), byte(len(content))}, content)
	case len(content) > 127:
		return slices.Concat([]byte{tag, 0x81, byte(len(content))}, content)
	}
	return append([]byte{tag, byte(len(content))}, content...)
}

// Certificate says what the record says, signed with that key.
func Certificate(a *statev1.Authority, trustDomain string, key *ecdsa.PrivateKey) []byte {
	moment := func(unix int64) []byte { return DER(0x17, []byte(time.Unix(unix, 0).UTC().Format("060102150405Z"))) }
	name := DER(0x30, []byte{0x06, 0x03, 0x55, 0x1d, 0x11}, DER(0x04, DER(0x30, DER(0x86, []byte("spiffe://"+trustDomain)))))
	algorithm := DER(0x30, []byte{0x06, 0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x04, 0x03, 0x02}) // ecdsa-with-SHA256
	tbs := DER(0x30, DER(0xa0, DER(0x02, []byte{2})), DER(0x02, []byte{1}), DER(0x30), DER(0x30),
		DER(0x30, moment(a.GetNotBefore()), moment(a.GetNotAfter())), DER(0x30), a.GetPublicKey(), DER(0xa3, DER(0x30, name)))
	return DER(0x30, tbs, algorithm, DER(0x03, []byte{0}, sign(key, tbs)))
}

// BundleKey is a key of another domain's bundle, of the name that Authority was given.
type BundleKey struct {
	Name  string
	Use   statev1.KeyUse
	Names string // the trust domain that its certificate or proof names; empty: none
	By    string // the name of the key that signed that; empty: the key itself
}

// Bundle is a SPIFFE bundle with these keys, as our writer writes it.
func Bundle(sequence uint64, keys ...BundleKey) []byte {
	text := []string{}
	for _, k := range keys {
		key, by := Key("authority "+k.Name), Key("authority "+cmp.Or(k.By, k.Name))
		spki := SPKI(key)
		point := spki[len(spki)-64:]
		number := base64.RawURLEncoding.EncodeToString
		a := &statev1.Authority{Id: ca.KeyID(spki), Use: k.Use, PublicKey: spki, NotBefore: 1, NotAfter: 1 << 32}
		jwk := fmt.Sprintf(`"crv":"P-256","x":"%s","y":"%s"`, number(point[:32]), number(point[32:]))
		switch {
		case k.Use == statev1.KeyUse_KEY_USE_X509:
			der := Certificate(a, k.Names, by)
			text = append(text, fmt.Sprintf(`{"kty":"EC","use":"x509-svid",%s,"x5c":["%s"]}`, jwk, base64.StdEncoding.EncodeToString(der)))
			continue
		case k.Names != "":
			signed := ca.KeyProof(k.Names, ca.ES256, k.Use, a.GetId())
			signature, err := ca.FixedSignature(sign(by, signed))
			if err != nil {
				panic(err)
			}
			jwk += fmt.Sprintf(`,"entente_proof":"%s.%s"`, signed, number(signature))
		}
		text = append(text, fmt.Sprintf(`{"kty":"EC","use":"%s","kid":"%s",%s}`, ca.UseName(k.Use), k.Name, jwk))
	}
	return fmt.Appendf(nil, `{"keys":[%s],"spiffe_sequence":%d}`, strings.Join(text, ","), sequence)
}

// Prepare is the command, signed by the node that the authority names, or by nobody's
// key if that was never named.
func Prepare(cluster *statev1.Cluster, a *statev1.Authority) *statev1.Command {
	key, ok := keys.Load(a.GetMemberId())
	if !ok {
		key = Key("nobody")
	}
	return PrepareBy(cluster, a, key.(*ecdsa.PrivateKey))
}

// PrepareBy is the command, signed by that key.
func PrepareBy(cluster *statev1.Cluster, a *statev1.Authority, key *ecdsa.PrivateKey) *statev1.Command {
	return &statev1.Command{Body: &statev1.Command_PrepareAuthority{PrepareAuthority: &statev1.PrepareAuthority{
		Authority: a, NodeKey: SPKI(key), Signature: signNote(key, ca.AuthorityStatement(cluster, a)),
	}}}
}

// Approve is the approval of a change by the operator of a CA node: signed with the key of
// the node with that name.
func Approve(statement [sha256.Size]byte, change []byte, node string) *statev1.Command {
	key := Key(node)
	return &statev1.Command{Actor: "operator of " + node, Body: &statev1.Command_ApproveChange{ApproveChange: &statev1.ApproveChange{
		Change: change, NodeKey: SPKI(key), Signature: signNote(key, statement),
	}}}
}

// signNote signs in the form that Apply verifies.
func signNote(key *ecdsa.PrivateKey, sum [sha256.Size]byte) []byte {
	signature, err := key.Sign(nil, sum[:], crypto.SHA256)
	if err == nil {
		signature, err = ca.FixedSignature(signature)
	}
	if err != nil {
		panic(err)
	}
	return signature
}
