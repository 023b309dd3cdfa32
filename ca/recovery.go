package ca

import (
	"bytes"
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/proto"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/internal/secret"
)

const (
	// RecoveryIDSize is the size of the random id of an epoch that a recovery began.
	RecoveryIDSize = 16

	recoveryPrefix  = "entente-recovery-"
	recoveryVersion = 1
	maxRecoveryText = 1 << 10

	// recoveryContext keeps a signature over a recovery from meaning anything elsewhere.
	recoveryContext = "entente recovery statement v1\x00"
)

// ErrRecoveryKey: what was given is not the recovery key of this cluster.
var ErrRecoveryKey = errors.New("not the recovery key of this cluster")

// RecoveryKey begins a new epoch of one cluster when its quorum is lost. It is made
// with the cluster, kept offline by the operators, and never stands on a CA node's
// disk; the log holds its public half. Only Text shows the secret.
type RecoveryKey struct {
	TrustDomain spiffeid.TrustDomain
	ClusterID   []byte       // ClusterIDSize bytes
	Seed        secret.Bytes // ed25519.SeedSize bytes
}

// Check says what is wrong with a recovery key.
func (k *RecoveryKey) Check() error {
	switch {
	case k.TrustDomain.IsZero() || len(k.TrustDomain.Name()) > MaxTrustDomain:
		return errors.New("trust domain is missing or too long")
	case len(k.ClusterID) != ClusterIDSize:
		return fmt.Errorf("cluster id has %d bytes, not %d", len(k.ClusterID), ClusterIDSize)
	case len(k.Seed) != ed25519.SeedSize:
		return fmt.Errorf("seed has %d bytes, not %d", len(k.Seed), ed25519.SeedSize)
	}
	return nil
}

// PublicKey is the half that the log holds.
func (k *RecoveryKey) PublicKey() ed25519.PublicKey {
	return ed25519.NewKeyFromSeed(k.Seed).Public().(ed25519.PublicKey)
}

// Fits says why this is not the recovery key of a cluster; nil if it is.
func (k *RecoveryKey) Fits(c *statev1.Cluster) error {
	switch {
	case len(c.GetRecoveryKey()) == 0:
		return fmt.Errorf("%w: it was made without one", ErrRecoveryKey)
	case !bytes.Equal(k.ClusterID, c.GetId()) || k.TrustDomain.Name() != c.GetTrustDomain():
		return fmt.Errorf("%w: it is that of another one, of %s", ErrRecoveryKey, k.TrustDomain.Name())
	case !bytes.Equal(k.PublicKey(), c.GetRecoveryKey()):
		return fmt.Errorf("%w: it was made with another one", ErrRecoveryKey)
	}
	return nil
}

// Sign signs the statement that begins an epoch.
func (k *RecoveryKey) Sign(st *statev1.RecoveryStatement) (*statev1.Recovery, error) {
	if err := k.Check(); err != nil {
		return nil, fmt.Errorf("sign recovery: %w", err)
	}
	statement, err := proto.MarshalOptions{Deterministic: true}.Marshal(st)
	if err != nil {
		return nil, fmt.Errorf("sign recovery: %w", err)
	}
	signature := ed25519.Sign(ed25519.NewKeyFromSeed(k.Seed), append([]byte(recoveryContext), statement...))
	return &statev1.Recovery{Statement: statement, Signature: signature}, nil
}

// VerifyRecovery verifies that a cluster's recovery key signed the statement, for this
// cluster, and only then decodes it. Whether its epoch is a later one is the caller's
// to compare.
func VerifyRecovery(c *statev1.Cluster, statement, signature []byte) (*statev1.RecoveryStatement, error) {
	switch {
	case len(c.GetRecoveryKey()) != ed25519.PublicKeySize:
		return nil, errors.New("the cluster was made without a recovery key")
	case len(statement) > maxStatement:
		return nil, fmt.Errorf("recovery statement has %d bytes, over %d", len(statement), maxStatement)
	case !ed25519.Verify(c.GetRecoveryKey(), append([]byte(recoveryContext), statement...), signature):
		return nil, errors.New("recovery statement is not signed with the cluster's recovery key")
	}
	st := &statev1.RecoveryStatement{}
	if err := proto.Unmarshal(statement, st); err != nil {
		return nil, fmt.Errorf("recovery statement does not decode: %w", err)
	}
	switch {
	case !bytes.Equal(st.GetClusterId(), c.GetId()):
		return nil, errors.New("recovery statement is for another cluster")
	case len(st.GetRecoveryId()) != RecoveryIDSize:
		return nil, fmt.Errorf("recovery id has %d bytes, not %d", len(st.GetRecoveryId()), RecoveryIDSize)
	case st.GetEpoch() == 0 || st.GetEpoch() > MaxEpoch:
		return nil, fmt.Errorf("epoch %d is not between 1 and %d", st.GetEpoch(), MaxEpoch)
	}
	return st, CheckKeyID(st.GetMemberId())
}

// RecoveryID is the id of the recovery that began a cluster's epoch; nil in the first.
func RecoveryID(c *statev1.Cluster) []byte {
	st := &statev1.RecoveryStatement{}
	if c.GetRecovery() == nil || proto.Unmarshal(c.GetRecovery().GetStatement(), st) != nil {
		return nil
	}
	return st.GetRecoveryId()
}

// String leaves the seed out.
func (k RecoveryKey) String() string { return "recovery key of " + k.TrustDomain.Name() }

// Format leaves the seed out, whatever the verb.
func (k RecoveryKey) Format(f fmt.State, _ rune) { io.WriteString(f, k.String()) }

// LogValue leaves the seed out.
func (k RecoveryKey) LogValue() slog.Value { return slog.StringValue(k.String()) }

// MarshalText leaves the seed out.
func (k RecoveryKey) MarshalText() ([]byte, error) { return []byte(k.String()), nil }

// Text is the one line to keep. It holds the secret.
func (k *RecoveryKey) Text() (string, error) {
	if err := k.Check(); err != nil {
		return "", fmt.Errorf("write recovery key: %w", err)
	}
	b := append([]byte{recoveryVersion}, k.ClusterID...)
	b = append(b, k.Seed...)
	b = appendText(b, k.TrustDomain.Name())
	sum := sha256.Sum256(b)
	return recoveryPrefix + base64.RawURLEncoding.EncodeToString(append(b, sum[:tokenChecksum]...)), nil
}

// ParseRecoveryKey reads what Text wrote; white space does not matter. Errors never
// show the key.
func ParseRecoveryKey(text string) (*RecoveryKey, error) {
	k, err := parseRecoveryKey(text)
	if err != nil {
		return nil, fmt.Errorf("read recovery key: %w", err)
	}
	return k, nil
}

func parseRecoveryKey(text string) (*RecoveryKey, error) {
	if len(text) > maxRecoveryText {
		return nil, fmt.Errorf("it has %d characters, over %d", len(text), maxRecoveryText)
	}
	encoded, ok := strings.CutPrefix(strings.Join(strings.Fields(text), ""), recoveryPrefix)
	if !ok {
		return nil, fmt.Errorf("it does not begin with %q; take the whole line that `entente ca init` printed", recoveryPrefix)
	}
	b, err := base64.RawURLEncoding.Strict().DecodeString(encoded)
	if err != nil || len(b) < tokenChecksum+1 {
		return nil, errors.New("a character does not belong into it, or its end is missing")
	}
	body, checksum := b[:len(b)-tokenChecksum], b[len(b)-tokenChecksum:]
	if sum := sha256.Sum256(body); !bytes.Equal(sum[:tokenChecksum], checksum) {
		return nil, errors.New("its checksum does not match: a part is missing or changed")
	}
	if body[0] != recoveryVersion {
		return nil, fmt.Errorf("its format %d is not known to this release, which reads format %d", body[0], recoveryVersion)
	}
	r := tokenReader{rest: body[1:]}
	k := &RecoveryKey{ClusterID: bytes.Clone(r.take(ClusterIDSize)), Seed: bytes.Clone(r.take(ed25519.SeedSize))}
	name := r.text(MaxTrustDomain)
	if r.bad || len(r.rest) != 0 {
		return nil, errors.New("it is malformed")
	}
	if k.TrustDomain, err = ParseTrustDomain(name); err != nil {
		return nil, err
	}
	return k, k.Check()
}

// recoveryPublicPrefix begins the public half of a recovery key, as configurations name it.
const recoveryPublicPrefix = "entente-recovery-public-"

// RecoveryKeyText is the public half of a recovery key as people carry it into
// configurations (`ca.recoveryKey`). It is no secret.
func RecoveryKeyText(public []byte) string {
	return recoveryPublicPrefix + base64.RawURLEncoding.EncodeToString(public)
}

// ParseRecoveryPublic reads what RecoveryKeyText wrote.
func ParseRecoveryPublic(text string) (ed25519.PublicKey, error) {
	encoded, ok := strings.CutPrefix(text, recoveryPublicPrefix)
	if !ok {
		return nil, fmt.Errorf("it does not begin with %q: `entente ca recovery-key` prints it", recoveryPublicPrefix)
	}
	key, err := base64.RawURLEncoding.Strict().DecodeString(encoded)
	if err != nil || len(key) != ed25519.PublicKeySize {
		return nil, errors.New("it is malformed or truncated: `entente ca recovery-key` prints it")
	}
	return key, nil
}

// ErrEpoch: a later epoch of a cluster is not proved.
var ErrEpoch = errors.New("the epoch is not proved")

// FollowCluster says why a subscriber that holds the record known of its cluster, and has
// pinned its recovery key, must not take next in its place; nil if it may. A later epoch
// begins with a statement that the pinned key signed, or the one that it was replaced by: no
// CA node's word makes one. known
// may be nil, on first trust; pinned empty: no key was ever seen.
func FollowCluster(known, next *statev1.Cluster, pinned []byte) error {
	pinned = FollowRecoveryKey(next, pinned)
	switch {
	case known == nil:
		return nil
	case known.GetTrustDomain() != next.GetTrustDomain() || !bytes.Equal(known.GetId(), next.GetId()):
		return fmt.Errorf("it is of cluster %x of %q, not of %x of %q", next.GetId(), next.GetTrustDomain(), known.GetId(), known.GetTrustDomain())
	case next.GetEpoch() < known.GetEpoch():
		return fmt.Errorf("it is of epoch %d, which a recovery has ended (now %d)", next.GetEpoch(), known.GetEpoch())
	case next.GetEpoch() == known.GetEpoch():
		return nil
	case len(pinned) == 0:
		return fmt.Errorf("%w: epoch %d follows epoch %d, and no recovery key is pinned to verify that: set ca.recoveryKey, or attest again with a new join token", ErrEpoch, next.GetEpoch(), known.GetEpoch())
	}
	st, err := VerifyRecovery(&statev1.Cluster{Id: known.GetId(), RecoveryKey: pinned}, next.GetRecovery().GetStatement(), next.GetRecovery().GetSignature())
	switch {
	case err != nil:
		return fmt.Errorf("%w: epoch %d follows epoch %d: %w", ErrEpoch, next.GetEpoch(), known.GetEpoch(), err)
	case st.GetEpoch() != next.GetEpoch():
		return fmt.Errorf("%w: the recovery statement is for epoch %d, not %d", ErrEpoch, st.GetEpoch(), next.GetEpoch())
	}
	return nil
}

// MaxReplacements is how many replacements of a recovery key a cluster's record keeps: so
// many may pass by a subscriber that is away.
const MaxReplacements = 16

// replacementContext keeps a signature over a replacement from meaning anything elsewhere.
const replacementContext = "entente recovery key replacement v1\x00"

func replacementMessage(clusterID []byte, r *statev1.RecoveryKeyReplacement) []byte {
	b := append([]byte(replacementContext), clusterID...)
	return append(append(b, r.GetFormer()...), r.GetNext()...)
}

// Replace has the key of next take the place of this one.
func (k *RecoveryKey) Replace(next *RecoveryKey) (*statev1.RecoveryKeyReplacement, error) {
	if err := errors.Join(k.Check(), next.Check()); err != nil {
		return nil, fmt.Errorf("replace recovery key: %w", err)
	}
	r := &statev1.RecoveryKeyReplacement{Former: k.PublicKey(), Next: next.PublicKey()}
	r.Signature = ed25519.Sign(ed25519.NewKeyFromSeed(k.Seed), replacementMessage(k.ClusterID, r))
	return r, nil
}

// CheckReplacement says what is wrong with a replacement's form.
func CheckReplacement(r *statev1.RecoveryKeyReplacement) error {
	switch {
	case len(r.GetFormer()) != ed25519.PublicKeySize || len(r.GetNext()) != ed25519.PublicKeySize:
		return fmt.Errorf("a recovery key has %d bytes: the replacement names keys of %d and %d", ed25519.PublicKeySize, len(r.GetFormer()), len(r.GetNext()))
	case bytes.Equal(r.GetFormer(), r.GetNext()):
		return errors.New("the new recovery key is the present one")
	}
	return nil
}

// SignedReplacement tells whether the former key of a cluster signed its replacement.
func SignedReplacement(clusterID []byte, r *statev1.RecoveryKeyReplacement) bool {
	return CheckReplacement(r) == nil && ed25519.Verify(r.GetFormer(), replacementMessage(clusterID, r), r.GetSignature())
}

// FollowRecoveryKey is the key to pin, for who has pinned one: the last one to which
// replacements lead that each former key signed.
func FollowRecoveryKey(c *statev1.Cluster, pinned []byte) []byte {
	for _, r := range c.GetReplaced()[:min(len(c.GetReplaced()), MaxReplacements)] {
		if bytes.Equal(r.GetFormer(), pinned) && SignedReplacement(c.GetId(), r) {
			pinned = r.GetNext()
		}
	}
	return pinned
}
