package evil

import (
	"context"
	"crypto/tls"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"time"

	"github.com/hashicorp/raft"
	"google.golang.org/protobuf/proto"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/ca"
)

// Voice speaks Raft to one other member with this member's key, in its own name, as a
// leader would, whoever was elected. The real node is best not running: its own messages
// would go between.
type Voice struct {
	from, to *statev1.Member
	network  *raft.NetworkTransport
}

// Voice opens a connection for Raft messages to another member of the cluster.
func (m *Member) Voice(cluster *statev1.Cluster, to *statev1.Member) *Voice {
	protocol := fmt.Sprintf("entente-raft/1/%s/%d", hex.EncodeToString(cluster.GetId()), cluster.GetEpoch())
	if id := ca.RecoveryID(cluster); len(id) > 0 {
		protocol += "/" + hex.EncodeToString(id)
	}
	layer := dialler{make(chan struct{}), &tls.Config{
		MinVersion: tls.VersionTLS13, InsecureSkipVerify: true, Certificates: []tls.Certificate{m.certificate}, NextProtos: []string{protocol},
	}}
	return &Voice{
		from: &statev1.Member{Id: m.ID}, to: to,
		network: raft.NewNetworkTransportWithConfig(&raft.NetworkTransportConfig{
			Stream: layer, MaxPool: 1, MaxRPCsInFlight: 1, Timeout: 5 * time.Second, MsgpackUseNewTimeFormat: true,
		}),
	}
}

// Close ends the connection.
func (v *Voice) Close() { v.network.Close() }

// Heard is what the other member knows and answered.
type Heard struct {
	Accepted bool
	Term     uint64 // of the election that it knows
	Last     uint64 // index of its last entry
}

// Append says, as the leader of a term, that the log holds entries behind the entry prev,
// which is of prevTerm. An error: the member refuses to hear it.
func (v *Voice) Append(term, prev, prevTerm uint64, entries ...*raft.Log) (Heard, error) {
	answer := &raft.AppendEntriesResponse{}
	err := v.network.AppendEntries(raft.ServerID(v.to.GetId()), raft.ServerAddress(v.to.GetRaftAddress()), &raft.AppendEntriesRequest{
		RPCHeader: raft.RPCHeader{ProtocolVersion: raft.ProtocolVersionMax, ID: []byte(v.from.GetId()), Addr: []byte(v.from.GetId())},
		Term:      term, PrevLogEntry: prev, PrevLogTerm: prevTerm, Entries: entries,
	}, answer)
	return Heard{answer.Success, answer.Term, answer.LastLog}, err
}

// Lead takes the member for itself: as the leader of a new term it finds out where the
// member's log ends, and of which term the entry at end-back is. What is appended then fits.
func (v *Voice) Lead(back uint64) (term, prev, prevTerm uint64, err error) {
	heard, err := v.Append(0, 0, 0)
	if err != nil {
		return 0, 0, 0, err
	}
	term, prev = heard.Term+1, heard.Last-back
	for prevTerm = heard.Term; prevTerm > 0; prevTerm-- {
		if heard, err = v.Append(term, prev, prevTerm); err != nil || heard.Accepted {
			return term, prev, prevTerm, err
		}
	}
	return 0, 0, 0, errors.New("no term fits the end of the member's log")
}

// Tick is an entry that moves the agreed time to a moment. Far from every clock, it
// attacks "agreed time is a majority's": tokens, agreements and distrust items end by it.
func Tick(term, index uint64, to time.Time) (*raft.Log, error) {
	return entry(term, index, &statev1.Command{Actor: "evil", Body: &statev1.Command_Tick{Tick: &statev1.Tick{UnixNanos: []int64{to.UnixNano()}}}})
}

// Noop is an entry that says nothing. In the place of one that was applied, it attacks
// "what is agreed stays".
func Noop(term, index uint64) *raft.Log {
	return &raft.Log{Term: term, Index: index, Type: raft.LogNoop}
}

func entry(term, index uint64, command *statev1.Command) (*raft.Log, error) {
	encoded, err := proto.Marshal(command)
	if err != nil {
		return nil, err
	}
	batch, err := proto.Marshal(&statev1.Batch{Commands: [][]byte{encoded}})
	return &raft.Log{Term: term, Index: index, Type: raft.LogCommand, Data: batch}, err
}

// dialler is the stream layer of who only speaks.
type dialler struct {
	closed chan struct{}
	config *tls.Config
}

func (d dialler) Dial(address raft.ServerAddress, timeout time.Duration) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	return (&tls.Dialer{Config: d.config}).DialContext(ctx, "tcp", string(address))
}

func (d dialler) Accept() (net.Conn, error) { <-d.closed; return nil, io.EOF }
func (d dialler) Close() error              { close(d.closed); return nil }
func (d dialler) Addr() net.Addr            { return &net.TCPAddr{} }
