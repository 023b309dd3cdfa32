package sds

import (
	"fmt"
	"maps"
	"slices"
	"strconv"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secret "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"google.golang.org/grpc"

	"github.com/entente-mesh/entente/meshagent/workloadattest"
)

// receive hands on what the client sends until the stream ends.
func receive[Q, R any](stream grpc.BidiStreamingServer[Q, R]) (<-chan *Q, <-chan error) {
	requests := make(chan *Q)
	failed := make(chan error, 1)
	go func() {
		for {
			q, err := stream.Recv()
			if err != nil {
				failed <- err
				return
			}
			select {
			case requests <- q:
			case <-stream.Context().Done():
				return
			}
		}
	}()
	return requests, failed
}

// nonces are numbered from 1 on each stream.
type nonces uint64

func (n *nonces) next() string {
	*n++
	return strconv.FormatUint(uint64(*n), 10)
}

// StreamSecrets is the state-of-the-world variant of the xDS transport: every
// response holds all that the stream has asked for.
func (s *Server) StreamSecrets(stream secret.SecretDiscoveryService_StreamSecretsServer) error {
	process, err := s.caller(stream.Context())
	if err != nil {
		return err
	}
	requests, failed := receive(stream)
	delivery := s.agent.Deliver(fmt.Sprintf("SDS, pid %d", process.PID()))
	defer delivery.Close()
	w := world{server: s, process: process}
	for {
		state := s.agent.State()
		// The client has all that the state has for it once it takes what it was sent; of
		// what has ended it lacks nothing.
		upToDate := w.nothing || w.taken
		if w.asked && !w.nothing {
			p, err := s.look(state, process, w.plain)
			if err != nil {
				return err
			}
			if p != nil {
				response, err := p.answer(w.names)
				if err != nil {
					return s.public(err)
				}
				if response != nil && (w.again || response.GetVersionInfo() != w.version) {
					w.again, w.version, w.nonce = false, response.GetVersionInfo(), w.count.next()
					response.Nonce = w.nonce
					w.taken = false
					if err := stream.Send(response); err != nil {
						return err
					}
				}
				upToDate = w.taken
			}
		}
		if upToDate {
			delivery.Got(state)
		}
		select {
		case q := <-requests:
			if err := w.take(q); err != nil {
				return err
			}
		case <-failed:
			return nil // it hung up
		case <-state.Reissued():
		case <-stream.Context().Done():
			return ended(stream.Context())
		}
	}
}

// world is one state-of-the-world stream.
type world struct {
	server  *Server
	process *workloadattest.Process

	asked   bool // the first request has come
	nothing bool // it has given up all its names
	plain   bool
	names   []string
	again   bool   // it is to be answered although nothing is new
	version string // sent last; whether taken or not, it is not sent again
	nonce   string // of that
	taken   bool   // the client has it and has not refused it
	count   nonces
}

// take works in a request: the first one, an acknowledgement, a refusal, or a
// change of names.
func (w *world) take(q *discovery.DiscoveryRequest) error {
	if err := checkType(q.GetTypeUrl()); err != nil {
		return err
	}
	if len(q.GetResourceNames()) > maxNames {
		return errNames
	}
	if !w.asked {
		// A nonce is of the stream before this one, and so is the version: both mean
		// nothing here, and the first request is always answered.
		w.asked, w.again, w.plain, w.names = true, true, plain(q.GetNode()), q.GetResourceNames()
		return nil
	}
	if q.GetResponseNonce() != w.nonce {
		return nil // of a response that a later one has overtaken: the client answers that one, too
	}
	if detail := q.GetErrorDetail(); detail != nil {
		w.server.refused(w.process, w.names, detail.GetMessage())
	} else {
		w.taken = true
	}
	before, now := slices.Sorted(slices.Values(w.names)), slices.Sorted(slices.Values(q.GetResourceNames()))
	if !slices.Equal(before, now) {
		w.nothing = len(now) == 0
		w.names, w.again = q.GetResourceNames(), true
	}
	return nil
}

// refused logs what a client did not take. It stays with what it has until there is
// something new.
func (s *Server) refused(process *workloadattest.Process, names []string, why string) {
	const most = 500
	s.log.Warn("an SDS client refuses a secret and goes on with the one before", "pid", process.PID(), "uid", process.UID,
		"names", names[:min(len(names), 8)], "reason", why[:min(len(why), most)])
}

// maxUnanswered responses of a delta stream are remembered for the log of refusals.
const maxUnanswered = 64

// DeltaSecrets is the incremental variant: a response holds what is new and names
// what the client may no longer have.
func (s *Server) DeltaSecrets(stream secret.SecretDiscoveryService_DeltaSecretsServer) error {
	process, err := s.caller(stream.Context())
	if err != nil {
		return err
	}
	requests, failed := receive(stream)
	delivery := s.agent.Deliver(fmt.Sprintf("SDS, pid %d", process.PID()))
	defer delivery.Close()
	d := delta{server: s, process: process, wanted: map[string]bool{}, sent: map[string]string{}, open: map[string][]string{}, refused: map[string]bool{}}
	for {
		state := s.agent.State()
		if d.asked {
			p, err := s.look(state, process, d.plain)
			if err != nil {
				return err
			}
			if p != nil {
				response, err := d.answer(p)
				if err != nil {
					return s.public(err)
				}
				if response != nil {
					if err := stream.Send(response); err != nil {
						return err
					}
				}
			}
			if (p != nil || len(d.sent) > 0) && len(d.open)+len(d.refused) == 0 {
				delivery.Got(state)
			}
		}
		select {
		case q := <-requests:
			if err := d.take(q); err != nil {
				return err
			}
		case <-failed:
			return nil
		case <-state.Reissued():
		case <-stream.Context().Done():
			return ended(stream.Context())
		}
	}
}

// absent is the version of a name that the client was told there is nothing of.
const absent = ""

// delta is one incremental stream.
type delta struct {
	server  *Server
	process *workloadattest.Process

	asked  bool
	plain  bool
	every  bool              // it wants everything there is
	wanted map[string]bool   // names asked for
	sent   map[string]string // version last sent, by name
	count  nonces
	open   map[string][]string // names by nonce, of responses without an answer yet
	order  []string            // nonces of open, oldest first

	refused map[string]bool // names whose newest version the client did not take
}

func (d *delta) take(q *discovery.DeltaDiscoveryRequest) error {
	if err := checkType(q.GetTypeUrl()); err != nil {
		return err
	}
	if nonce := q.GetResponseNonce(); nonce != "" {
		names, known := d.open[nonce]
		delete(d.open, nonce)
		d.order = slices.DeleteFunc(d.order, func(n string) bool { return n == nonce })
		detail := q.GetErrorDetail()
		if detail != nil && known {
			d.server.refused(d.process, names, detail.GetMessage())
		}
		for _, name := range names {
			if delete(d.refused, name); detail != nil {
				d.refused[name] = true
			}
		}
	}
	subscribe := q.GetResourceNamesSubscribe()
	if !d.asked {
		d.asked, d.plain = true, plain(q.GetNode())
		d.every = len(subscribe) == 0
		if len(q.GetInitialResourceVersions()) > maxNames {
			return errNames
		}
		maps.Copy(d.sent, q.GetInitialResourceVersions())
	} else {
		// Who subscribes again has lost what it had.
		for _, name := range subscribe {
			delete(d.sent, name)
		}
	}
	for _, name := range subscribe {
		if name == "*" {
			d.every = true
			continue
		}
		d.wanted[name] = true
	}
	for _, name := range q.GetResourceNamesUnsubscribe() {
		if name == "*" {
			d.every = false
			continue
		}
		delete(d.wanted, name)
		delete(d.sent, name)
		delete(d.refused, name)
	}
	if len(d.wanted) > maxNames {
		return errNames
	}
	return nil
}

// answer is nil when the client has everything.
func (d *delta) answer(p *picture) (*discovery.DeltaDiscoveryResponse, error) {
	names := slices.Collect(maps.Keys(d.wanted))
	if d.every {
		names = append(names, p.names()...)
	}
	slices.Sort(names)
	names = slices.Compact(names)

	response := &discovery.DeltaDiscoveryResponse{TypeUrl: typeURL}
	var touched []string
	var versions [][]byte
	for _, name := range names {
		r, err := p.find(name)
		if err != nil {
			return nil, err
		}
		before, told := d.sent[name]
		if r == nil {
			if !told || before != absent {
				response.RemovedResources = append(response.RemovedResources, name)
				d.sent[name] = absent
				touched = append(touched, name)
			}
			continue
		}
		versions = append(versions, []byte(r.version))
		if before == r.version {
			continue
		}
		response.Resources = append(response.Resources, &discovery.Resource{Name: name, Version: r.version, Resource: r.secret})
		d.sent[name] = r.version
		touched = append(touched, name)
	}
	// What everything no longer has in it.
	for _, name := range slices.Sorted(maps.Keys(d.sent)) {
		if _, listed := slices.BinarySearch(names, name); !listed {
			if d.sent[name] != absent {
				response.RemovedResources = append(response.RemovedResources, name)
				touched = append(touched, name)
			}
			delete(d.sent, name)
		}
	}
	if len(touched) == 0 {
		return nil, nil
	}
	response.SystemVersionInfo, response.Nonce = digest(versions...), d.count.next()
	if len(d.order) == maxUnanswered {
		delete(d.open, d.order[0])
		d.order = d.order[1:]
	}
	d.open[response.Nonce] = touched
	d.order = append(d.order, response.Nonce)
	return response, nil
}
