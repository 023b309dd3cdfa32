package ca

import (
	"bytes"
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/proto"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/internal/secret"
)

// What a join token can admit, as JoinStatement.role says it.
const (
	RoleNode  = "node"
	RoleAgent = "agent"
)

// ExporterLabel is the TLS exporter label (RFC 8446 section 7.5) that binds a join
// statement to its connection; the exporter has ExporterSize bytes, no context.
const (
	ExporterLabel = "EXPORTER-entente-join"
	ExporterSize  = 32
)

// Bounds of a token and its text.
const (
	ClusterIDSize   = 16
	MaxTokenID      = 64
	MaxTokenText    = 8 << 10
	MaxTokenLife    = 7 * 24 * time.Hour // checked where tokens are minted
	maxTokenEntries = 32                 // addresses, and pins
)

const (
	tokenPrefix   = "entente-join-"
	tokenVersion  = 2 // 1: without the recovery key
	tokenChecksum = 4
)

// Token is what an operator carries to a host: it admits one key, once, as what
// the record of the same id in the log grants (I9). The seed is a secret; only Text
// shows it, and no way of printing or logging a Token does.
type Token struct {
	Role        string // RoleNode or RoleAgent
	TrustDomain spiffeid.TrustDomain
	ClusterID   []byte // ClusterIDSize bytes
	Epoch       uint32
	ID          string       // of the record in the log
	Seed        secret.Bytes // ed25519.SeedSize bytes
	Addresses   []string     // API addresses of CA nodes, HOST:PORT
	Pins        []string     // key ids of the CA nodes that may answer there
	// RecoveryKey is the public half of the cluster's, which the bearer pins: Ed25519.
	// Empty: the text has format 1, which releases before read as well.
	RecoveryKey []byte
}

// Check says what is wrong with a token.
func (t *Token) Check() error {
	switch {
	case t.Role != RoleNode && t.Role != RoleAgent:
		return fmt.Errorf("role %.40q is neither %q nor %q", t.Role, RoleNode, RoleAgent)
	case t.TrustDomain.IsZero() || len(t.TrustDomain.Name()) > MaxTrustDomain:
		return errors.New("trust domain is missing or too long")
	case len(t.ClusterID) != ClusterIDSize:
		return fmt.Errorf("cluster id has %d bytes, not %d", len(t.ClusterID), ClusterIDSize)
	case t.Epoch > MaxEpoch:
		return fmt.Errorf("epoch %d is over %d", t.Epoch, MaxEpoch)
	case len(t.Seed) != ed25519.SeedSize:
		return fmt.Errorf("seed has %d bytes, not %d", len(t.Seed), ed25519.SeedSize)
	case len(t.RecoveryKey) != 0 && len(t.RecoveryKey) != ed25519.PublicKeySize:
		return fmt.Errorf("recovery key has %d bytes, not %d", len(t.RecoveryKey), ed25519.PublicKeySize)
	case len(t.Addresses) == 0 || len(t.Addresses) > maxTokenEntries:
		return fmt.Errorf("%d addresses of CA nodes, not 1 to %d", len(t.Addresses), maxTokenEntries)
	case len(t.Pins) == 0 || len(t.Pins) > maxTokenEntries:
		return fmt.Errorf("%d pinned keys of CA nodes, not 1 to %d", len(t.Pins), maxTokenEntries)
	}
	if err := CheckTokenID(t.ID); err != nil {
		return err
	}
	for _, address := range t.Addresses {
		if err := CheckAddress(address); err != nil {
			return err
		}
	}
	for _, pin := range t.Pins {
		if err := CheckKeyID(pin); err != nil {
			return err
		}
	}
	return nil
}

// CheckTokenID refuses what is not 1 to MaxTokenID lower-case letters and digits.
func CheckTokenID(id string) error {
	if id == "" || len(id) > MaxTokenID {
		return fmt.Errorf("token id has %d characters, not 1 to %d", len(id), MaxTokenID)
	}
	for i := range len(id) {
		if !lowerAlphanumeric(id[i]) {
			return fmt.Errorf("token id %q holds something else than lower-case letters and digits", id)
		}
	}
	return nil
}

// PublicKey is the half of the token that the log holds.
func (t *Token) PublicKey() ed25519.PublicKey {
	return ed25519.NewKeyFromSeed(t.Seed).Public().(ed25519.PublicKey)
}

// Pinned tells whether a CA node with that key id may answer a bearer of the token.
func (t *Token) Pinned(keyID string) bool {
	return slices.Contains(t.Pins, keyID)
}

// Sign makes the statement with which the holder of the key keyID joins over the
// connection with that TLS exporter, and signs it.
func (t *Token) Sign(keyID string, exporter []byte) (statement, signature []byte, err error) {
	return SignStatement(t.Seed, &statev1.JoinStatement{
		ClusterId: t.ClusterID, Epoch: t.Epoch, TokenId: t.ID, Role: t.Role, KeyId: keyID, Exporter: exporter,
	})
}

// String leaves the seed out.
func (t Token) String() string {
	return fmt.Sprintf("%s token %s of %s", t.Role, t.ID, t.TrustDomain.Name())
}

// Format leaves the seed out, whatever the verb.
func (t Token) Format(f fmt.State, _ rune) { io.WriteString(f, t.String()) }

// LogValue leaves the seed out.
func (t Token) LogValue() slog.Value { return slog.StringValue(t.String()) }

// MarshalJSON leaves the seed out.
func (t Token) MarshalJSON() ([]byte, error) { return json.Marshal(t.String()) }

// Text is the one line to carry to the host. It holds the secret.
func (t *Token) Text() (string, error) {
	if err := t.Check(); err != nil {
		return "", fmt.Errorf("write join token: %w", err)
	}
	version := byte(tokenVersion)
	if len(t.RecoveryKey) == 0 {
		version = 1
	}
	b := []byte{version, roleByte(t.Role)}
	b = append(b, t.ClusterID...)
	b = binary.AppendUvarint(b, uint64(t.Epoch))
	b = append(b, t.Seed...)
	b = appendText(b, t.TrustDomain.Name())
	b = appendText(b, t.ID)
	b = binary.AppendUvarint(b, uint64(len(t.Addresses)))
	for _, address := range t.Addresses {
		b = appendText(b, address)
	}
	b = binary.AppendUvarint(b, uint64(len(t.Pins)))
	for _, pin := range t.Pins {
		b, _ = hex.AppendDecode(b, []byte(pin)) // Check saw that it is hex
	}
	b = append(b, t.RecoveryKey...)
	sum := sha256.Sum256(b)
	return tokenPrefix + base64.RawURLEncoding.EncodeToString(append(b, sum[:tokenChecksum]...)), nil
}

// ParseToken reads what Text wrote. White space around it and line breaks that a
// terminal put in are dropped. Errors never show the token.
func ParseToken(text string) (*Token, error) {
	t, err := parseToken(text)
	if err != nil {
		return nil, fmt.Errorf("read join token: %w", err)
	}
	return t, nil
}

func parseToken(text string) (*Token, error) {
	if len(text) > MaxTokenText {
		return nil, fmt.Errorf("it has %d characters, over %d", len(text), MaxTokenText)
	}
	text = strings.Join(strings.Fields(text), "")
	if text == "" {
		return nil, errors.New("it is empty")
	}
	encoded, ok := strings.CutPrefix(text, tokenPrefix)
	if !ok {
		return nil, fmt.Errorf("it does not begin with %q; copy the whole line that the CA printed", tokenPrefix)
	}
	b, err := base64.RawURLEncoding.Strict().DecodeString(encoded)
	if err != nil {
		return nil, errors.New("a character does not belong into it, or its end is missing; copy the whole line that the CA printed")
	}
	if len(b) < tokenChecksum+1 {
		return nil, errors.New("its end is missing; copy the whole line that the CA printed")
	}
	body, checksum := b[:len(b)-tokenChecksum], b[len(b)-tokenChecksum:]
	if sum := sha256.Sum256(body); !bytes.Equal(sum[:tokenChecksum], checksum) {
		return nil, errors.New("its checksum does not match: a part is missing or changed; copy the whole line that the CA printed")
	}
	if body[0] == 0 || body[0] > tokenVersion {
		return nil, fmt.Errorf("its format %d is not known to this release, which reads formats 1 to %d", body[0], tokenVersion)
	}
	r := tokenReader{rest: body[1:]}
	t := &Token{}
	switch r.take(1)[0] {
	case roleByte(RoleNode):
		t.Role = RoleNode
	case roleByte(RoleAgent):
		t.Role = RoleAgent
	}
	t.ClusterID = bytes.Clone(r.take(ClusterIDSize))
	t.Epoch = uint32(r.number(MaxEpoch))
	t.Seed = bytes.Clone(r.take(ed25519.SeedSize))
	name := r.text(MaxTrustDomain)
	t.ID = r.text(MaxTokenID)
	for range r.number(maxTokenEntries) {
		t.Addresses = append(t.Addresses, r.text(300))
	}
	for range r.number(maxTokenEntries) {
		t.Pins = append(t.Pins, hex.EncodeToString(r.take(sha256.Size)))
	}
	if body[0] > 1 {
		t.RecoveryKey = bytes.Clone(r.take(ed25519.PublicKeySize))
	}
	if r.bad || len(r.rest) != 0 {
		return nil, errors.New("it is malformed")
	}
	if t.TrustDomain, err = ParseTrustDomain(name); err != nil {
		return nil, err
	}
	if err := t.Check(); err != nil {
		return nil, err
	}
	return t, nil
}

func roleByte(role string) byte {
	if role == RoleNode {
		return 'n'
	}
	return 'a'
}

func appendText(b []byte, s string) []byte {
	return append(binary.AppendUvarint(b, uint64(len(s))), s...)
}

// tokenReader takes a token's body apart. After the first fault it returns zeros.
type tokenReader struct {
	rest []byte
	bad  bool
}

func (r *tokenReader) take(n int) []byte {
	if r.bad || n > len(r.rest) {
		r.bad = true
		return make([]byte, n)
	}
	b := r.rest[:n]
	r.rest = r.rest[n:]
	return b
}

func (r *tokenReader) number(limit uint64) uint64 {
	v, n := binary.Uvarint(r.rest)
	if r.bad || n <= 0 || v > limit {
		r.bad = true
		return 0
	}
	r.rest = r.rest[n:]
	return v
}

func (r *tokenReader) text(limit int) string {
	return string(r.take(int(r.number(uint64(limit)))))
}

// statementContext keeps a signature over a join statement from meaning anything
// elsewhere.
const statementContext = "entente join statement v1\x00"

const maxStatement = 1 << 10

// SignStatement encodes a statement and signs it with a token's seed.
func SignStatement(seed []byte, st *statev1.JoinStatement) (statement, signature []byte, err error) {
	if len(seed) != ed25519.SeedSize {
		return nil, nil, fmt.Errorf("sign join statement: seed has %d bytes, not %d", len(seed), ed25519.SeedSize)
	}
	statement, err = proto.MarshalOptions{Deterministic: true}.Marshal(st)
	if err != nil {
		return nil, nil, fmt.Errorf("sign join statement: %w", err)
	}
	signature = ed25519.Sign(ed25519.NewKeyFromSeed(seed), append([]byte(statementContext), statement...))
	return statement, signature, nil
}

// VerifyStatement verifies the signature over the statement's bytes as they came
// and only then decodes them. The caller compares the fields (CheckStatement).
func VerifyStatement(publicKey, statement, signature []byte) (*statev1.JoinStatement, error) {
	switch {
	case len(publicKey) != ed25519.PublicKeySize:
		return nil, fmt.Errorf("token key has %d bytes, not %d", len(publicKey), ed25519.PublicKeySize)
	case len(statement) > maxStatement:
		return nil, fmt.Errorf("join statement has %d bytes, over %d", len(statement), maxStatement)
	case !ed25519.Verify(publicKey, append([]byte(statementContext), statement...), signature):
		return nil, errors.New("join statement is not signed with the token")
	}
	st := &statev1.JoinStatement{}
	if err := proto.Unmarshal(statement, st); err != nil {
		return nil, fmt.Errorf("join statement does not decode: %w", err)
	}
	return st, nil
}

// CheckStatement compares a verified statement with what it must say. Only a door
// knows the exporter of the connection: nil leaves it unchecked.
func CheckStatement(st *statev1.JoinStatement, cluster *statev1.Cluster, tokenID, role, keyID string, exporter []byte) error {
	switch {
	case !bytes.Equal(st.GetClusterId(), cluster.GetId()):
		return errors.New("join statement is for another cluster")
	case st.GetEpoch() != cluster.GetEpoch():
		return fmt.Errorf("join statement is for epoch %d, the cluster is in epoch %d", st.GetEpoch(), cluster.GetEpoch())
	case st.GetTokenId() != tokenID:
		return errors.New("join statement is for another token")
	case st.GetRole() != role:
		return fmt.Errorf("join statement asks for role %.20q, not %q", st.GetRole(), role)
	case st.GetKeyId() != keyID || CheckKeyID(keyID) != nil:
		return errors.New("join statement is for another key")
	case len(st.GetExporter()) != ExporterSize:
		return fmt.Errorf("join statement is not bound to a connection: exporter has %d bytes, not %d", len(st.GetExporter()), ExporterSize)
	case exporter != nil && !bytes.Equal(st.GetExporter(), exporter):
		return errors.New("join statement is bound to another connection")
	}
	return nil
}
