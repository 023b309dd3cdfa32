package replica

import (
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/raft"

	"github.com/entente-mesh/entente/ca/domain"
)

// Who closes the transport may take away what its goroutines look at, so it waits for them:
// also for one that judges a message at that moment.
func TestTransportWaitsForItsGoroutines(t *testing.T) {
	t.Parallel()
	a, b := newNode(t, "ca1"), newNode(t, "ca2")
	cfg := listening(t, a.config())
	if err := cfg.complete(); err != nil {
		t.Fatal(err)
	}
	f := &fsm{self: a.id, state: membersState(t, a, b.member())}
	f.applied.Store(f.state.Applied())
	s := newStreams(&cfg, &roster{self: a.id, fsm: f, disk: &disk{}, running: new(atomic.Pointer[raft.Raft])}, protocol(clusterID, 0, nil))
	judging, goOn := make(chan struct{}), make(chan struct{})
	begin := sync.OnceFunc(func() { close(judging) })
	trans := newTransport(s, &cfg, &leaderCheck{
		wall: time.Now, log: cfg.Log, read: func(f func(*domain.State)) {}, configuration: func() []raft.Server { return nil },
		applied: func() uint64 {
			begin()
			<-goOn
			return 0
		},
	})
	a.address = s.listener.Addr().String()
	peer := newDoor(t, b, membersState(t, a, b.member()))
	said := make(chan error, 1)
	go func() {
		said <- speak(t, peer, a, func(n raft.Transport, to raft.ServerID, at raft.ServerAddress) error {
			return n.AppendEntries(to, at, &raft.AppendEntriesRequest{
				RPCHeader: raft.RPCHeader{ProtocolVersion: raft.ProtocolVersionMax, ID: []byte(b.id), Addr: []byte(b.address)},
				Term:      1, Entries: []*raft.Log{{Index: 1, Term: 1, Type: raft.LogCommand}},
			}, &raft.AppendEntriesResponse{})
		})
	}()
	<-judging
	closed := make(chan struct{})
	go func() {
		defer close(closed)
		trans.Close()
	}()
	<-s.closed
	select {
	case <-closed:
		t.Error("it is closed, and a goroutine of it still judges a message")
	case <-time.After(50 * time.Millisecond):
	}
	close(goOn)
	<-closed // control: it waits for nothing else
	if err := <-said; err == nil {
		t.Error("a message was answered by a transport that is closed")
	}
	trans.Close() // Raft closes it as well
}
