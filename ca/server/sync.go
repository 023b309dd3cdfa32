package server

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"time"
	"unicode"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
	"github.com/entente-mesh/entente/ca"
	"github.com/entente-mesh/entente/ca/domain"
	"github.com/entente-mesh/entente/ca/feed"
	"github.com/entente-mesh/entente/ca/presence"
	"github.com/entente-mesh/entente/ca/wire"
)

const (
	helloTimeout   = 10 * time.Second
	catchUpTimeout = time.Second
	maxBootID      = 64
)

// syncDoor pushes to agents and gateways.
type syncDoor struct {
	ententev1.UnimplementedSyncServer
	server *Server
}

func (d syncDoor) Sync(stream ententev1.Sync_SyncServer) error {
	s, c := d.server, callerFrom(stream.Context())
	end, err := s.syncs.begin(c.id.String() + " on " + c.agent.GetName())
	if err != nil {
		s.metrics.limited.WithLabelValues("streams").Inc()
		return err
	}
	defer end()
	received := make(chan *ententev1.SyncRequest)
	ended := make(chan error, 1)
	done := make(chan struct{})
	defer close(done)
	// It ends when the handler returns: Recv fails then, and nobody waits on received.
	go func() {
		for {
			message, err := stream.Recv()
			if err != nil {
				ended <- err
				return
			}
			select {
			case received <- message:
			case <-done:
				return
			}
		}
	}()

	hello, err := s.hello(received, ended)
	if err != nil {
		return err
	}
	session, err := s.subscribe(stream.Context(), c, hello)
	if err != nil {
		return err
	}
	goodbye := false
	defer func() { session.Close(time.Now(), goodbye) }()

	name := c.id.String()
	s.Log.Debug("a subscriber attached", "subscriber", name, "resume", hello.GetResumeRevision())
	out := &sender{server: s, stream: stream, session: session}
	beating := s.pulse.join(hello.GetLevel() > 0)
	defer s.pulse.leave(beating)
	warned := false
	// An agent's reports are full lists: of those that come too fast the last one counts.
	var report *ententev1.InstanceReport // that waits; nil: none
	var again <-chan time.Time
	take := func() {
		if wait := s.reports.Take(c.agent.GetName(), 1, time.Now()); wait > 0 {
			again = time.After(wait)
			return
		}
		instances, refused := s.checkReport(c, report.GetInstances())
		if refused != nil && !warned {
			warned = true // once per stream
			s.Log.Warn("an agent reported an instance that it may not serve; it is left out", "agent", name, "reason", refused)
		}
		session.Report(time.Now(), instances)
		report, again = nil, nil
	}
	for {
		select {
		case <-session.Wake:
			err = out.news()
		case beat := <-beating.due:
			err = out.beat(beat)
		case <-again:
			take()
		case message := <-received:
			switch m := message.GetMessage().(type) {
			case *ententev1.SyncRequest_Ack:
				if err = s.acknowledged(session, name, m.Ack); err == nil && m.Ack.GetProof() != nil {
					session.Prove(s.checkProof(c, hello, m.Ack.GetProof()))
				}
			case *ententev1.SyncRequest_Report:
				waits := report != nil
				if report = m.Report; waits {
					s.metrics.limited.WithLabelValues("report").Inc()
				} else {
					take()
				}
			case *ententev1.SyncRequest_Hello:
				err = status.Error(codes.InvalidArgument, "a stream has one Hello")
			default:
				err = status.Error(codes.InvalidArgument, "a message of a kind that this CA node does not know")
			}
		case err = <-ended:
			if goodbye = errors.Is(err, io.EOF); goodbye {
				return nil
			}
			return err
		case <-s.stopping:
			return status.Error(codes.Unavailable, "this CA node shuts down; another has the same state")
		}
		if err != nil {
			return syncError(err)
		}
	}
}

// checkHeld bounds what a subscriber may have this node remember.
func checkHeld(authorities []string) error {
	const most = 256
	if len(authorities) > most {
		return status.Errorf(codes.InvalidArgument, "SVIDs under %d authorities, over %d", len(authorities), most)
	}
	for _, id := range authorities {
		if len(id) > 64 {
			return status.Error(codes.InvalidArgument, "an authority key id has over 64 characters")
		}
	}
	return nil
}

// checkNames cuts what a subscriber may have this node remember for people.
func checkNames(names []string, most int) []string {
	const longest = 100
	names = slices.Clone(names[:min(len(names), most)])
	for i, name := range names {
		names[i] = strings.ToValidUTF8(strings.Map(func(r rune) rune {
			if unicode.IsControl(r) {
				return -1
			}
			return r
		}, name[:min(len(name), longest)]), "")
	}
	return names
}

func (s *Server) hello(received <-chan *ententev1.SyncRequest, ended <-chan error) (*ententev1.Hello, error) {
	timeout := time.NewTimer(helloTimeout)
	defer timeout.Stop()
	select {
	case message := <-received:
		hello := message.GetHello()
		if hello == nil {
			return nil, status.Error(codes.InvalidArgument, "the first message of a stream is Hello")
		}
		if id := hello.GetBootId(); id == "" || len(id) > maxBootID {
			return nil, status.Errorf(codes.InvalidArgument, "boot_id has %d bytes, not 1 to %d", len(id), maxBootID)
		}
		return hello, nil
	case err := <-ended:
		return nil, err
	case <-timeout.C:
		return nil, status.Error(codes.DeadlineExceeded, "no Hello came")
	case <-s.stopping:
		return nil, status.Error(codes.Unavailable, "this CA node shuts down")
	}
}

// checkProof returns a proof of the session that other CA nodes will accept, signed with
// the key that the subscriber shows; empty: none. Without it the subscriber is served as
// well: it may be of the release before.
func (s *Server) checkProof(c caller, hello *ententev1.Hello, proof *ententev1.SessionProof) presence.Proof {
	if proof == nil {
		return presence.Proof{}
	}
	session := ca.Session{Subscriber: ca.Origin{Agent: c.agent.GetName(), Entry: c.entry.GetId()}.Subscriber(), BootID: hello.GetBootId(), Connect: hello.GetConnect(), NodeID: s.NodeID}
	s.State.Read(func(st *domain.State) { session.Cluster = st.Cluster().GetId() })
	keyID, err := session.Verify(proof.GetPublicKey(), proof.GetSignature())
	if err == nil && keyID != c.keyID {
		err = errors.New("the proof of a session is by another key than the subscriber shows")
	}
	if err != nil {
		s.Log.Warn("a subscriber's proof of its session is not valid: other CA nodes will not know at once where it is", "subscriber", c.String(), "error", err)
		return presence.Proof{}
	}
	return presence.Proof{PublicKey: string(proof.GetPublicKey()), Signature: string(proof.GetSignature())}
}

// subscribe waits a little when the subscriber comes from a replica that is ahead.
func (s *Server) subscribe(ctx context.Context, c caller, hello *ententev1.Hello) (*feed.Session, error) {
	who := feed.Subscriber{
		Path:    c.id.Path(),
		Version: presence.Version{BootID: hello.GetBootId(), Connect: hello.GetConnect()},
	}
	who.Level = hello.GetLevel()
	who.Proof = s.checkProof(c, hello, hello.GetProof())
	who.Agent, who.EntryID = c.agent.GetName(), c.entry.GetId()
	deadline := time.Now().Add(catchUpTimeout)
	for {
		var session *feed.Session
		var err error
		s.State.Read(func(st *domain.State) {
			session, err = s.Feed.Subscribe(time.Now(), st, who, hello.GetResumeRevision())
		})
		if err == nil {
			return session, nil
		}
		if !errors.Is(err, feed.ErrAhead) || time.Now().After(deadline) {
			return nil, syncError(err)
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(20 * time.Millisecond):
		}
	}
}

func syncError(err error) error {
	switch {
	case errors.Is(err, feed.ErrAhead):
		return status.Error(codes.Unavailable, "this CA node has not caught up with what you have seen; another may have")
	case errors.Is(err, feed.ErrSuperseded):
		return status.Error(codes.Aborted, "a later session of yours took over")
	case errors.Is(err, feed.ErrBanned), errors.Is(err, feed.ErrUnknown):
		return status.Error(codes.PermissionDenied, err.Error())
	}
	return err
}

// acknowledged takes what a subscriber says with an acknowledgement, but for its proof.
func (s *Server) acknowledged(session *feed.Session, name string, ack *ententev1.Ack) error {
	if ack.GetAuthoritiesKnown() {
		if err := checkHeld(ack.GetAuthorities()); err != nil {
			s.metrics.limited.WithLabelValues("report").Inc()
			return err
		}
		session.Holds(ack.GetAuthorities())
	}
	session.Ack(ack.GetRevision())
	session.Waits(checkNames(ack.GetWaitingFor(), 10))
	session.Skipped(checkNames(ack.GetSkipped(), feed.MostTooOld))
	const most = 8
	if nodes := checkNames(ack.GetContradicted(), most); session.Contradicts(nodes) {
		s.Log.Error("a subscriber avoids CA nodes that two others contradict", "subscriber", name, "avoided", nodes)
	}
	return nil
}

// sender writes one stream; one goroutine uses it.
type sender struct {
	server  *Server
	stream  ententev1.Sync_SyncServer
	session *feed.Session
}

// news sends what both lanes have. A subscriber that reads slowly holds up nobody but
// itself: what changes meanwhile is coalesced.
func (o *sender) news() error {
	var update feed.Update
	var has bool
	var err error
	var hint time.Duration
	var urgent feed.Urgent
	var isUrgent bool
	o.server.State.Read(func(st *domain.State) {
		urgent, isUrgent = o.session.Urgent(st)
		update, has, err = o.session.Policy(st)
		hint = st.Lifetimes().RefreshHint
	})
	if err != nil {
		return err
	}
	if isUrgent {
		for _, chunk := range urgentToWire(urgent) {
			if err := o.send(&ententev1.SyncResponse{Message: &ententev1.SyncResponse_Urgent{Urgent: chunk}}); err != nil {
				return err
			}
		}
	}
	if has {
		chunks, err := o.server.policyToWire(update, hint)
		if err != nil {
			return status.Error(codes.Internal, err.Error())
		}
		for _, chunk := range chunks {
			if err := o.send(&ententev1.SyncResponse{Message: &ententev1.SyncResponse_Policy{Policy: chunk}}); err != nil {
				return err
			}
		}
	}
	instances, has := o.session.Presence()
	if !has {
		return nil
	}
	for _, chunk := range subscriberPresence(instances) {
		if err := o.send(&ententev1.SyncResponse{Message: &ententev1.SyncResponse_Presence{Presence: chunk}}); err != nil {
			return err
		}
	}
	return nil
}

// beat sends a heartbeat, which other streams send as well: it is not to be changed.
func (o *sender) beat(beat *ententev1.SyncResponse) error {
	if revision, ok := o.session.Catch(); ok {
		last := &ententev1.Policy{Last: true, Revision: revision}
		if err := o.send(&ententev1.SyncResponse{Message: &ententev1.SyncResponse_Policy{Policy: last}}); err != nil {
			return err
		}
	}
	return o.send(beat)
}

func (o *sender) send(message *ententev1.SyncResponse) error { return o.stream.Send(message) }

func subscriberPresence(in feed.Instances) []*ententev1.Presence {
	chunk := &ententev1.Presence{Withdrawn: wire.FromInstances(in.Withdrawn)}
	chunks := []*ententev1.Presence{chunk}
	size := proto.Size(chunk)
	for _, i := range in.Upserts {
		row := wire.FromInstance(i)
		if size += proto.Size(row) + 8; size > chunkSize {
			chunk, size = &ententev1.Presence{}, proto.Size(row)
			chunks = append(chunks, chunk)
		}
		chunk.Instances = append(chunk.Instances, row)
	}
	chunk.Complete = in.Complete
	return chunks
}

// checkReport leaves out what the reporter may not say: an agent speaks for services
// whose entry names its host, at addresses that it was admitted with. The datacenter is
// the one it was admitted with, too.
func (s *Server) checkReport(c caller, reported []*ententev1.Instance) (instances []presence.Instance, refused error) {
	if c.class != agent {
		if len(reported) > 0 {
			refused = errors.New("only agents report instances")
		}
		return nil, refused
	}
	defer func(all int) { s.metrics.leftOut.Add(float64(all - len(instances))) }(len(reported))
	if len(reported) > presence.MaxInstancesPerAgent {
		reported, refused = reported[:presence.MaxInstancesPerAgent], errors.New("too many instances")
	}
	of := map[string]int{}
	s.State.Read(func(st *domain.State) {
		for _, r := range reported {
			if err := mayServe(st, c.agent, r); err != nil {
				refused = err
				continue
			}
			if of[r.GetService()]++; of[r.GetService()] > presence.MaxInstancesOfService {
				refused = fmt.Errorf("service %s has over %d instances on this host", r.GetService(), presence.MaxInstancesOfService)
				continue
			}
			instance := wire.ToInstance(r)
			instance.Datacenter = c.agent.GetDatacenter()
			instances = append(instances, instance)
		}
	})
	return instances, refused
}

func mayServe(st *domain.State, agent *statev1.Agent, r *ententev1.Instance) error {
	if r.GetId() != "" {
		if err := ca.CheckLabel(r.GetId()); err != nil {
			return fmt.Errorf("id of an instance of service %s: %w", r.GetService(), err)
		}
	}
	e, ok := st.Entry(ca.ServiceEntry(r.GetService()))
	if !ok || !ca.Entitled(agent, e) {
		return errors.New("service " + r.GetService() + " does not run on this host")
	}
	host, _, err := net.SplitHostPort(r.GetAddress())
	if err != nil || !slices.Contains(agent.GetAddresses(), host) {
		return errors.New("address " + r.GetAddress() + " was not registered for this host; its join token names the addresses")
	}
	return nil
}
