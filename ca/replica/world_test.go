package replica

import (
	"cmp"
	"context"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	mathrand "math/rand/v2"
	"net"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/raft"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/ca"
	"github.com/entente-mesh/entente/ca/domain"
	"github.com/entente-mesh/entente/internal/simnet"
)

// beat is calm enough for a loaded machine: leadership must not flap while tests look.
const beat = 200 * time.Millisecond

var clusterID = []byte("0123456789abcdef")

// node is one member's place: what survives a crash of the replica in it.
type node struct {
	t       testing.TB
	name    string
	id      string
	cert    tls.Certificate
	dir     string
	address string
	beat    time.Duration // 0: that of all tests

	group *[]*node // the cluster it belongs to, itself included

	network *simnet.Network // nil: TCP
	shelf   *memoryShelf    // nil: bbolt

	*Replica
	stop func() error // ends Run and returns what it returned

	mu       sync.Mutex
	applied  []domain.Outcome
	restored atomic.Int32
}

func selfSigned(t testing.TB) (tls.Certificate, string) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	// Long ended, on purpose: a pinned key has no validity.
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "node"},
		NotBefore: time.Unix(0, 0), NotAfter: time.Unix(1, 0),
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, keyID(leaf)
}

func newNode(t testing.TB, name string) *node {
	t.Helper()
	n := placeNode(t, name)
	host := "127.0.0.1"
	if runtime.GOOS == "linux" { // of its own: nobody else is given the port meanwhile
		host = fmt.Sprintf("127.%d.%d.%d", 1+mathrand.IntN(250), mathrand.IntN(250), 1+mathrand.IntN(250))
	}
	l, err := net.Listen("tcp", host+":0")
	if err != nil {
		t.Fatal(err)
	}
	n.address = l.Addr().String()
	l.Close()
	return n
}

func placeNode(t testing.TB, name string) *node {
	t.Helper()
	cert, id := selfSigned(t)
	n := &node{t: t, name: name, id: id, cert: cert, dir: tempDir(t)}
	n.group = &[]*node{n}
	return n
}

var onDisk bool // benchmarks only

// tempDir is in memory where that is easy: on a busy disk a sync takes longer than an
// election, and what these tests look at is not the disk.
func tempDir(t testing.TB) string {
	t.Helper()
	if onDisk {
		return t.TempDir()
	}
	dir, err := os.MkdirTemp("/dev/shm", "replica")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func (n *node) config() Config {
	level := slog.LevelError + 4
	if os.Getenv("RAFT_LOG") != "" {
		level = slog.LevelDebug
	}
	cfg := Config{
		Dir: n.dir, Certificate: n.cert, Advertise: n.address,
		Log:      slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: level})).With("node", n.name),
		Timing:   Timing{Heartbeat: cmp.Or(n.beat, beat), DiskStall: 10 * time.Second},
		farewell: 5 * time.Second,
		OnApply: func(o domain.Outcome) {
			n.mu.Lock()
			defer n.mu.Unlock()
			n.applied = append(n.applied, o)
		},
		OnRestore: func() { n.restored.Add(1) },
	}
	if n.network != nil {
		cfg.Dial = func(ctx context.Context, address string) (net.Conn, error) {
			return n.network.Dial(ctx, n.name, address)
		}
	}
	if n.shelf != nil {
		cfg.wrapStore = n.toMemory
	}
	return cfg
}

// toMemory takes what a procedure left on the disk, once; from then on the shelf counts.
func (n *node) toMemory(s store) store {
	b := s.(*boltStore)
	defer b.Close()
	if n.shelf.content.stable != nil {
		return n.shelf.open(b.applied)
	}
	m := n.shelf.open(b.applied)
	latency := n.shelf.latency
	n.shelf.latency = nil
	defer func() { n.shelf.latency = latency }()
	first, last := b.bounds()
	for i := first; i <= last && last > 0; i++ {
		log := new(raft.Log)
		if err := errors.Join(b.GetLog(i, log), m.StoreLog(log)); err != nil {
			n.t.Fatal(err)
		}
	}
	if term, err := b.GetUint64(keyCurrentTerm); err == nil {
		m.SetUint64(keyCurrentTerm, term)
	}
	committed, _ := b.Committed()
	m.Mark(committed)
	return m
}

func (n *node) listen() (net.Listener, error) {
	if n.network != nil {
		return n.network.Listen(n.name, n.address)
	}
	return net.Listen("tcp", n.address)
}

// member is the node's record.
func (n *node) member() *statev1.Member {
	return &statev1.Member{
		Id: n.id, Name: n.name, Datacenter: "dc1", RaftAddress: n.address, ApiAddress: apiAddress(n.name),
		Voter: true, Signing: true,
	}
}

func apiAddress(name string) string { return name + ".example:7443" }

func initCommand(first *node) *statev1.Command {
	return &statev1.Command{Body: &statev1.Command_Init{Init: &statev1.Init{
		Cluster: &statev1.Cluster{TrustDomain: "banking.example", Id: clusterID, RecoveryKey: recoveryKey().PublicKey()},
		Member:  first.member(),
	}}}
}

// start opens the replica and runs it. It ends with the test if nobody ends it before.
func (n *node) start(change ...func(*Config)) {
	n.t.Helper()
	cfg := n.config()
	for _, f := range change {
		f(&cfg)
	}
	var err error
	for range 50 { // the port may still be in the hands of the node's former life
		if cfg.Listener, err = n.listen(); err == nil {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	if err != nil {
		n.t.Fatal(err)
	}
	n.Replica, err = Open(cfg)
	if err != nil {
		n.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	running := n.Replica
	go func() { done <- running.Run(ctx) }()
	n.stop = sync.OnceValue(func() error {
		cancel()
		return <-done
	})
	n.t.Cleanup(func() { n.stop() })
}

// kill cuts the node off as a crash would: no farewell, no hand-over.
func (n *node) kill() {
	if n.shelf != nil {
		// Nothing is between two of Raft's goroutines now: what is, when they end, stays
		// unanswered, and a bubble does not end with a goroutine in it.
		synctest.Wait()
		n.shelf.crash() // nothing that is done now reaches it
	}
	n.Replica.Close()
	n.stop()
}

// cluster starts a cluster of the named nodes, all voters.
func cluster(t testing.TB, names ...string) []*node {
	t.Helper()
	return clusterOf(t, newNode, names...)
}

func clusterOf(t testing.TB, newNode func(t testing.TB, name string) *node, names ...string) []*node {
	t.Helper()
	first := newNode(t, names[0])
	if err := Bootstrap(first.config(), initCommand(first)); err != nil {
		t.Fatal(err)
	}
	first.start()
	awaitLeader(t, first)
	nodes := []*node{first}
	for _, name := range names[1:] {
		n := newNode(t, name)
		join(t, first, n)
		nodes = append(nodes, n)
	}
	return nodes
}

// join admits n to the cluster of member and waits until it votes.
func join(t testing.TB, member, n *node, change ...func(*Config)) {
	t.Helper()
	admit(t, member, n)
	n.start(change...)
	promote(t, member, n)
}

// admit has the membership agreed and writes what the joiner needs.
func admit(t testing.TB, member, n *node) {
	t.Helper()
	var current *statev1.Cluster
	leaderOf(t, member).Read(func(s *domain.State) { current = s.Cluster() })
	for _, command := range admitting(t, current.GetEpoch(), n.member()) {
		carryOut(t, member, command)
	}
	var members []*statev1.Member
	leaderOf(t, member).Read(func(s *domain.State) { current, members = s.Cluster(), s.Members() })
	if err := PrepareJoin(n.config(), current, members); err != nil {
		t.Fatal(err)
	}
	*member.group = append(*member.group, n)
	n.group = member.group
}

// admitting is a token for m and its use.
func admitting(t testing.TB, epoch uint32, m *statev1.Member) []*statev1.Command {
	t.Helper()
	seed := make([]byte, ed25519.SeedSize)
	if _, err := io.ReadFull(rand.Reader, seed); err != nil {
		t.Fatal(err)
	}
	tokenID := "join" + m.GetName()
	statement, signature, err := ca.SignStatement(seed, &statev1.JoinStatement{
		ClusterId: clusterID, Epoch: epoch, TokenId: tokenID, Role: ca.RoleNode, KeyId: m.GetId(), Exporter: make([]byte, ca.ExporterSize),
	})
	if err != nil {
		t.Fatal(err)
	}
	return []*statev1.Command{
		{Body: &statev1.Command_CreateToken{CreateToken: &statev1.CreateToken{Token: &statev1.Token{
			Id: tokenID, PublicKey: ed25519.NewKeyFromSeed(seed).Public().(ed25519.PublicKey),
			NotAfter: time.Date(2100, 1, 1, 0, 0, 0, 0, time.UTC).Unix(),
			Grant: &statev1.Token_Node{Node: &statev1.NodeGrant{
				Name: m.GetName(), Datacenter: m.GetDatacenter(), Voter: m.GetVoter(), Signing: m.GetSigning(),
			}},
		}}}},
		{Body: &statev1.Command_JoinMember{JoinMember: &statev1.JoinMember{
			TokenId: tokenID, Statement: statement, Signature: signature, Member: m,
		}}},
	}
}

func promote(t testing.TB, member, n *node) {
	t.Helper()
	byLeader(t, member, func(leader *node) error { return leader.AddNonvoter(testContext(t), n.id, n.address) })
	byLeader(t, member, func(leader *node) error { return leader.AddVoter(testContext(t), n.id, n.address) })
}

// byLeader repeats f at whoever leads, until it succeeds.
func byLeader(t testing.TB, member *node, f func(leader *node) error) {
	t.Helper()
	await(t, "the leader to do it", func() bool {
		err := f(leaderOf(t, member))
		if err != nil && !passes(err) {
			t.Fatal(err)
		}
		return err == nil
	})
}

// passes says whether an error is one of a moment.
func passes(err error) bool {
	var elsewhere ErrNotLeader
	return errors.As(err, &elsewhere) || errors.Is(err, ErrNoQuorum) || errors.Is(err, ErrOutcomeUnknown) || errors.Is(err, ErrBehind)
}

func leaderOf(t testing.TB, member *node) *node {
	t.Helper()
	return awaitLeader(t, *member.group...)
}

// patienceOfTests is for a machine that does much else; what succeeds does not use it up.
const patienceOfTests = time.Minute

func testContext(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), patienceOfTests)
	t.Cleanup(cancel)
	return ctx
}

func await(t testing.TB, what string, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(patienceOfTests)
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatalf("waited in vain: %s", what)
		}
		time.Sleep(2 * time.Millisecond)
	}
}

func awaitLeader(t testing.TB, nodes ...*node) *node {
	t.Helper()
	var leader *node
	await(t, "a leader", func() bool {
		for _, n := range nodes {
			if n.Replica != nil && n.IsLeader() && n.Barrier(testContext(t)) == nil {
				leader = n
				return true
			}
		}
		return false
	})
	return leader
}

// token is a small write: a token with that id.
func token(id string) *statev1.Command {
	return &statev1.Command{Body: &statev1.Command_CreateToken{CreateToken: &statev1.CreateToken{Token: &statev1.Token{
		Id: id, PublicKey: make([]byte, 32), NotAfter: time.Date(2100, 1, 1, 0, 0, 0, 0, time.UTC).Unix(),
		Grant: &statev1.Token_Agent{Agent: &statev1.AgentGrant{Name: "host", Datacenter: "dc1"}},
	}}}}
}

func tickCommand(at time.Time) *statev1.Command {
	return &statev1.Command{Body: &statev1.Command_Tick{Tick: &statev1.Tick{UnixNanos: []int64{at.UnixNano()}}}}
}

func removeCommand(id string) *statev1.Command {
	return &statev1.Command{Body: &statev1.Command_RemoveMember{RemoveMember: &statev1.RemoveMember{Id: id}}}
}

// carryOut has a command agreed by the cluster of member, whoever leads it.
func carryOut(t testing.TB, member *node, command *statev1.Command) {
	t.Helper()
	repeated := false
	byLeader(t, member, func(leader *node) error {
		outcome, err := leader.Propose(testContext(t), command)
		switch refused := outcome.Refused; {
		case err != nil:
			repeated = true
			return err
		case refused != nil && !(repeated && refused.Code == domain.CodeNotFound): // removed the first time
			t.Fatal(refused)
		}
		return nil
	})
}

// takeSnapshot has the node take one now. Raft refuses while its newest membership entry
// is newer than the last command.
func takeSnapshot(t testing.TB, n *node) {
	t.Helper()
	await(t, "a snapshot", func() bool {
		carryOut(t, n, tickCommand(time.Now()))
		return n.raft.Snapshot().Error() == nil
	})
}

func (n *node) has(id string) bool {
	found := false
	n.Read(func(s *domain.State) { _, found = s.Token(id) })
	return found
}

// alike waits until the nodes hold the same state.
func alike(t testing.TB, nodes ...*node) {
	t.Helper()
	await(t, "equal states", func() bool {
		for _, n := range nodes {
			if n.checksum() != nodes[0].checksum() {
				return false
			}
		}
		return true
	})
}

func (n *node) checksum() string {
	var sum string
	n.Read(func(s *domain.State) { sum = fmt.Sprintf("%x", s.Checksum()) })
	return sum
}
