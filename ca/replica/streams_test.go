package replica

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/raft"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/ca/domain"
)

func loopback(t testing.TB) net.Listener {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

// door is a stream layer over a state whose members are the test's.
type door struct {
	*streams
	fsm *fsm
}

// newDoor opens n's door in a cluster of first and of members that first admitted.
func newDoor(t *testing.T, n *node, state *domain.State) *door {
	t.Helper()
	cfg := listening(t, n.config())
	if err := cfg.complete(); err != nil {
		t.Fatal(err)
	}
	f := &fsm{self: n.id, state: state}
	f.applied.Store(state.Applied())
	s := newStreams(&cfg, &roster{self: n.id, fsm: f, disk: &disk{}, running: new(atomic.Pointer[raft.Raft])}, protocol(clusterID, 0, nil))
	t.Cleanup(func() { s.Close() })
	// Raft's transport, as far as these tests need it: say hello and stay.
	go func() {
		for {
			conn, err := s.Accept()
			if err != nil {
				return
			}
			go func() {
				io.WriteString(conn, "hello")
				io.Copy(io.Discard, conn)
				conn.Close()
			}()
		}
	}()
	return &door{s, f}
}

func (d *door) at() string { return d.listener.Addr().String() }

// membersState has first as its first member and the others admitted by tokens.
func membersState(t *testing.T, first *node, others ...*statev1.Member) *domain.State {
	t.Helper()
	s := domain.New()
	apply := func(c *statev1.Command) {
		t.Helper()
		if o := s.Apply(s.Applied()+1, c); o.Fatal != nil || o.Refused != nil {
			t.Fatal(o.Fatal, o.Refused)
		}
	}
	apply(initCommand(first))
	for _, m := range others {
		for _, c := range admitting(t, 0, m) {
			apply(c)
		}
	}
	return s
}

func target(id, at string) raft.ServerAddress { return raft.ServerAddress(id + "@" + at) }

// greeted dials as n and says whether the door let it in.
func greeted(t *testing.T, from *door, id, at string) error {
	t.Helper()
	conn, err := from.Dial(target(id, at), 2*time.Second)
	if err != nil {
		return err
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(5 * time.Second))
	_, err = io.ReadFull(conn, make([]byte, 5))
	return err
}

func TestDoorAdmitsVotersOnly(t *testing.T) {
	t.Parallel()
	a, b, witness, stranger := newNode(t, "ca1"), newNode(t, "ca2"), newNode(t, "ca3"), newNode(t, "ca4")
	nonvoter := witness.member()
	nonvoter.Voter = false
	state := membersState(t, a, b.member(), nonvoter)
	doorA := newDoor(t, a, state)

	if err := greeted(t, newDoor(t, b, membersState(t, a, b.member())), a.id, doorA.at()); err != nil {
		t.Errorf("control: a voter is refused: %v", err)
	}
	if err := greeted(t, newDoor(t, stranger, membersState(t, a, b.member())), a.id, doorA.at()); err == nil {
		t.Error("a stranger's key was admitted")
	}
	if err := greeted(t, newDoor(t, witness, membersState(t, a, nonvoter)), a.id, doorA.at()); err == nil {
		t.Error("a non-voter was admitted")
	}
	// But the leader reaches it.
	doorC := newDoor(t, witness, membersState(t, a, b.member()))
	if err := greeted(t, doorA, witness.id, doorC.at()); err != nil {
		t.Errorf("control: the leader cannot reach a non-voter: %v", err)
	}
}

// The dialler, too, accepts only the key it means to reach.
func TestDialPinsTheKey(t *testing.T) {
	t.Parallel()
	a, b, stranger := newNode(t, "ca1"), newNode(t, "ca2"), newNode(t, "ca4")
	state := membersState(t, a, b.member())
	doorA, doorB, doorX := newDoor(t, a, state), newDoor(t, b, state), newDoor(t, stranger, state)
	if err := greeted(t, doorA, b.id, doorB.at()); err != nil {
		t.Errorf("control: %v", err)
	}
	if err := greeted(t, doorA, b.id, doorX.at()); err == nil {
		t.Error("another key at the member's address was accepted")
	}
	if err := greeted(t, doorA, stranger.id, doorX.at()); err == nil {
		t.Error("a node that is no member was dialled")
	}
	if err := greeted(t, doorB, b.id, doorB.at()); err == nil {
		t.Error("a node dialled itself")
	}
}

func TestDoorKnowsItsCluster(t *testing.T) {
	t.Parallel()
	a, b := newNode(t, "ca1"), newNode(t, "ca2")
	doorA := newDoor(t, a, membersState(t, a, b.member()))
	good := protocol(clusterID, 0, nil)
	for name, test := range map[string]struct {
		alpn    []string
		version uint16
		cert    bool
		ok      bool
	}{
		"control":            {[]string{good}, 0, true, true},
		"another cluster":    {[]string{protocol([]byte("another cluster!"), 0, nil)}, 0, true, false},
		"another recovery":   {[]string{protocol(clusterID, 0, []byte("another recovery"))}, 0, true, false},
		"an epoch before":    {[]string{protocol(clusterID, 1, nil)}, 0, true, false},
		"no protocol at all": {nil, 0, true, false},
		"TLS 1.2":            {[]string{good}, tls.VersionTLS12, true, false},
		"no certificate":     {[]string{good}, 0, false, false},
	} {
		t.Run(name, func(t *testing.T) {
			config := &tls.Config{InsecureSkipVerify: true, NextProtos: test.alpn, MaxVersion: test.version}
			if test.cert {
				config.Certificates = []tls.Certificate{b.cert}
			}
			conn, err := tls.Dial("tcp", doorA.at(), config)
			if err == nil {
				defer conn.Close()
				conn.SetDeadline(time.Now().Add(5 * time.Second))
				_, err = io.ReadFull(conn, make([]byte, 5))
			}
			if (err == nil) != test.ok {
				t.Errorf("%v", err)
			}
		})
	}
}

func TestRemovedMemberIsCutOff(t *testing.T) {
	t.Parallel()
	a, b := newNode(t, "ca1"), newNode(t, "ca2")
	state := membersState(t, a, b.member())
	doorA, doorB := newDoor(t, a, state), newDoor(t, b, membersState(t, a, b.member()))
	conn, err := doorB.Dial(target(a.id, doorA.at()), time.Second)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(5 * time.Second))
	if _, err := io.ReadFull(conn, make([]byte, 5)); err != nil {
		t.Fatal("control:", err)
	}
	doorA.recheck()
	if doorA.count() != 1 {
		t.Fatal("control: a member's connection was closed")
	}

	doorA.fsm.mu.Lock()
	outcome := state.Apply(state.Applied()+1, removeCommand(b.id))
	doorA.fsm.applied.Store(state.Applied())
	doorA.fsm.mu.Unlock()
	if outcome.Refused != nil {
		t.Fatal(outcome.Refused)
	}
	doorA.recheck()
	if _, err := conn.Read(make([]byte, 1)); err == nil || errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("the removed member's connection is open: %v", err)
	}
	if err := greeted(t, doorB, a.id, doorA.at()); err == nil {
		t.Error("the removed member came in again")
	}
	if err := greeted(t, doorA, b.id, doorB.at()); err == nil {
		t.Error("the removed member was dialled")
	}
}

// A joiner has no state: it goes by its list, until it finds itself in the state.
func TestJoinersList(t *testing.T) {
	t.Parallel()
	a, b := newNode(t, "ca1"), newNode(t, "ca2")
	doorA := newDoor(t, a, membersState(t, a, b.member()))
	doorB := newDoor(t, b, domain.New())
	if err := greeted(t, doorA, b.id, doorB.at()); err == nil {
		t.Error("a joiner without a list accepted somebody")
	}
	doorB.roster.joining = []joinMember{{ID: a.id, Address: a.address, Voter: true}}
	if err := greeted(t, doorA, b.id, doorB.at()); err != nil {
		t.Errorf("control: the leader of the list is refused: %v", err)
	}
	// The state arrives, as it was before b joined: c led the cluster then.
	c := newNode(t, "ca3")
	doorB.fsm.adopt(membersState(t, c), 1)
	if err := greeted(t, doorA, b.id, doorB.at()); err != nil {
		t.Errorf("while it catches up, the list counts: %v", err)
	}
	// Then as it is now, without a.
	now := membersState(t, c, b.member())
	doorB.fsm.adopt(now, now.Applied())
	if err := greeted(t, doorA, b.id, doorB.at()); err == nil {
		t.Error("the list outlived the join")
	}
}

func TestKillCutsEverything(t *testing.T) {
	t.Parallel()
	a, b := newNode(t, "ca1"), newNode(t, "ca2")
	state := membersState(t, a, b.member())
	doorA, doorB := newDoor(t, a, state), newDoor(t, b, state)
	in, err := doorB.Dial(target(a.id, doorA.at()), time.Second)
	if err != nil {
		t.Fatal(err)
	}
	out, err := doorA.Dial(target(b.id, doorB.at()), time.Second)
	if err != nil {
		t.Fatal(err)
	}
	for _, conn := range []net.Conn{in, out} {
		conn.SetDeadline(time.Now().Add(5 * time.Second))
		if _, err := io.ReadFull(conn, make([]byte, 5)); err != nil {
			t.Fatal("control:", err)
		}
	}
	doorA.kill()
	for _, conn := range []net.Conn{in, out} {
		var netErr net.Error
		if _, err := conn.Read(make([]byte, 1)); err == nil || errors.As(err, &netErr) && netErr.Timeout() {
			t.Errorf("a connection survived: %v", err)
		}
	}
	if _, err := doorA.Dial(target(b.id, doorB.at()), time.Second); !errors.Is(err, ErrStopped) {
		t.Errorf("a dial after the kill: %v", err)
	}
	if err := greeted(t, doorB, a.id, doorA.at()); err == nil {
		t.Error("the killed door admitted somebody")
	}
	if n := doorA.count(); n != 0 {
		t.Errorf("%d connections are still counted", n)
	}
}

// Who connects and says nothing keeps no member out, however many connections he opens:
// handshakes are shared among the addresses that they come from.
func TestSilentClientsDoNotBlock(t *testing.T) {
	t.Parallel()
	a, b := newNode(t, "ca1"), newNode(t, "ca2")
	state := membersState(t, a, b.member())
	doorA, doorB := newDoor(t, a, state), newDoor(t, b, state)
	elsewhere := &net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 2)}}
	doorB.dial = func(ctx context.Context, address string) (net.Conn, error) {
		return elsewhere.DialContext(ctx, "tcp", address)
	}
	if err := greeted(t, doorB, a.id, doorA.at()); err != nil {
		t.Fatal("control:", err)
	}
	// They come again as often as they are turned away.
	ctx, cancel := context.WithCancel(t.Context())
	var silent sync.WaitGroup
	defer silent.Wait()
	defer cancel()
	var opened atomic.Int64
	for range 2 * handshakes {
		silent.Go(func() {
			for ctx.Err() == nil {
				conn, err := net.Dial("tcp", doorA.at())
				if err != nil {
					time.Sleep(10 * time.Millisecond)
					continue
				}
				opened.Add(1)
				stop := context.AfterFunc(ctx, func() { conn.Close() })
				io.Copy(io.Discard, conn)
				stop()
				conn.Close()
			}
		})
	}
	await(t, "silent connections", func() bool { return opened.Load() >= 2*handshakes })
	for range 3 {
		if err := greeted(t, doorB, a.id, doorA.at()); err != nil {
			t.Errorf("a member waits behind silent clients: %v", err)
		}
	}
}

// A voter that lags has to work with members of whom it has only Raft's word, but no
// longer than it lags.
func TestNewestMembershipCountsWhileTheStateLags(t *testing.T) {
	t.Parallel()
	leader := cluster(t, "ca1")[0]
	unknown := newNode(t, "ca2")
	find := func() bool {
		known, _, _ := leader.trans.roster.find(unknown.id)
		return known
	}
	if find() {
		t.Error("a stranger is known")
	}
	if err := leader.AddNonvoter(testContext(t), unknown.id, unknown.address); err != nil {
		t.Fatal(err)
	}
	if !find() {
		t.Error("a member of Raft's newest membership is unknown although the state ends before it")
	}
	if leader.trans.roster.voter(unknown.id) {
		t.Error("a non-voter may connect")
	}
	carryOut(t, leader, token("later"))
	if find() {
		t.Error("the state is newer than Raft's membership and does not know it, but it still counts")
	}
}

// speak sends one Raft message over a connection of n's key to its peer and returns
// what came of it.
func speak(t *testing.T, from *door, to *node, send func(raft.Transport, raft.ServerID, raft.ServerAddress) error) error {
	t.Helper()
	network := newNetwork(dialling{from.streams}, from.log)
	defer network.CloseStreams()
	return send(network, raft.ServerID(to.id), target(to.id, to.address))
}

// A stolen voter's key speaks for that voter only: what names another one as its sender
// reaches nobody, in whatever message, and the connection is cut.
func TestMessagesNameTheirSender(t *testing.T) {
	t.Parallel()
	nodes := cluster(t, "ca1", "ca2", "ca3")
	leader := awaitLeader(t, nodes...)
	others := slices.DeleteFunc(slices.Clone(nodes), func(n *node) bool { return n == leader })
	second, third := others[0], others[1]
	term := leader.raft.CurrentTerm()
	thief := newDoor(t, &node{t: t, name: "thief", id: third.id, cert: third.cert, dir: tempDir(t), address: third.address},
		membersState(t, leader, second.member()))
	header := func(id string) raft.RPCHeader {
		return raft.RPCHeader{ProtocolVersion: raft.ProtocolVersionMax, ID: []byte(id), Addr: []byte(leader.address)}
	}
	messages := map[string]func(id string) error{
		"vote": func(id string) error {
			return speak(t, thief, second, func(n raft.Transport, to raft.ServerID, at raft.ServerAddress) error {
				return n.RequestVote(to, at, &raft.RequestVoteRequest{RPCHeader: header(id)}, &raft.RequestVoteResponse{})
			})
		},
		"pre-vote": func(id string) error {
			return speak(t, thief, second, func(n raft.Transport, to raft.ServerID, at raft.ServerAddress) error {
				return n.(*raft.NetworkTransport).RequestPreVote(to, at, &raft.RequestPreVoteRequest{RPCHeader: header(id)}, &raft.RequestPreVoteResponse{})
			})
		},
		"heartbeat": func(id string) error {
			return speak(t, thief, second, func(n raft.Transport, to raft.ServerID, at raft.ServerAddress) error {
				return n.AppendEntries(to, at, &raft.AppendEntriesRequest{RPCHeader: header(id), Term: 1}, &raft.AppendEntriesResponse{})
			})
		},
		"entries": func(id string) error {
			return speak(t, thief, second, func(n raft.Transport, to raft.ServerID, at raft.ServerAddress) error {
				return n.AppendEntries(to, at, &raft.AppendEntriesRequest{RPCHeader: header(id), Term: 1, PrevLogEntry: 1}, &raft.AppendEntriesResponse{})
			})
		},
		"snapshot": func(id string) error {
			return speak(t, thief, second, func(n raft.Transport, to raft.ServerID, at raft.ServerAddress) error {
				return n.InstallSnapshot(to, at, &raft.InstallSnapshotRequest{RPCHeader: header(id), Term: 1, Size: 4}, &raft.InstallSnapshotResponse{}, strings.NewReader("none"))
			})
		},
	}
	for name, say := range messages {
		// An old term: what is heard changes nothing.
		if err := say(third.id); err != nil {
			t.Errorf("control: a %s in its own name: %v", name, err)
		}
		if err := say(leader.id); err == nil {
			t.Errorf("a %s in the leader's name was heard", name)
		}
		if err := say(""); err == nil {
			t.Errorf("a %s in nobody's name was heard", name)
		}
	}
	if !leader.IsLeader() || leader.raft.CurrentTerm() != term {
		t.Errorf("leads: %v, term %d, was %d", leader.IsLeader(), leader.raft.CurrentTerm(), term)
	}
	await(t, "the second follows the leader", func() bool { return second.Leader() == leader.id })
}
