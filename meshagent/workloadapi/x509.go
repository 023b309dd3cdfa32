package workloadapi

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/entente-mesh/entente/meshagent"
	"github.com/entente-mesh/entente/meshagent/workloadattest"
)

// FetchX509SVID streams the caller's X.509-SVIDs (Workload API 5.2.1).
func (s *Server) FetchX509SVID(_ *workload.X509SVIDRequest, stream grpc.ServerStreamingServer[workload.X509SVIDResponse]) error {
	return follow(s, stream, svidResponse)
}

// FetchX509Bundles streams the bundles the caller may verify peers with (Workload
// API 5.2.2).
func (s *Server) FetchX509Bundles(_ *workload.X509BundlesRequest, stream grpc.ServerStreamingServer[workload.X509BundlesResponse]) error {
	return follow(s, stream, bundlesResponse)
}

// errDenied says no more than that: the reason is for the agent's log.
var errDenied = status.Error(codes.PermissionDenied, "no identity issued")

// follow sends the caller its full state at once and again whenever that is
// another one, until the entitlement or the stream ends. answer makes a response
// of a state and the caller's identities in it, of which there is at least one;
// nil when there is nothing to send: nothing yet, or all of it has ended. A stream
// then stays open until there is.
func follow[R any, P interface {
	*R
	proto.Message
}](s *Server, stream grpc.ServerStreamingServer[R], answer func(*meshagent.State, []*meshagent.Identity) (P, error)) error {
	process, err := callerOf(stream.Context())
	if err != nil {
		return err
	}
	var late <-chan time.Time // set while there is nothing to send yet
	delivery := s.agent.Deliver("Workload API, pid " + strconv.Itoa(process.PID()))
	defer delivery.Close()
	var sent P
	for {
		state := s.agent.State()
		var next P
		if state.Ready {
			entitled := state.IdentitiesOf(process)
			if len(entitled) == 0 {
				s.log.Info("a Workload API client has no identity", "pid", process.PID(), "uid", process.UID, "reason", reason(state, process))
				return errDenied
			}
			if next, err = answer(state, entitled); errors.Is(err, errDenied) {
				return errDenied
			} else if err != nil {
				s.log.Error("cannot answer a Workload API client", "pid", process.PID(), "error", err)
				return status.Error(codes.Internal, "the identity cannot be handed out; see the agent's log")
			}
		}
		if next != nil && !proto.Equal(next, sent) {
			if err := stream.Send((*R)(next)); err != nil {
				return err
			}
			sent = next
		}
		if next != nil || sent != nil { // of what has all ended nothing is lacking
			delivery.Got(state)
		}

		if sent != nil {
			late = nil
		} else if late == nil {
			late = time.After(s.patience)
		}
		select {
		case <-state.Reissued():
		case <-stream.Context().Done():
			return status.FromContextError(stream.Context().Err()).Err()
		case <-late:
			return status.Error(codes.Unavailable, "the agent has no SVID for this workload yet; try again")
		case <-s.stopping:
			return status.Error(codes.Unavailable, "the agent is stopping")
		}
	}
}

// reason says, for the log, what kept a process from the host's entries: from the
// first few, which on most hosts are all.
func reason(state *meshagent.State, process *workloadattest.Process) error {
	const most = 8
	if len(state.Identities) == 0 {
		return errors.New("this host has no entries")
	}
	var why []error
	for _, identity := range state.Identities[:min(most, len(state.Identities))] {
		if err := process.Satisfies(identity.Demands); err != nil {
			why = append(why, fmt.Errorf("%s: %w", identity.Entry.GetId(), err))
		}
	}
	return errors.Join(why...)
}

// svidResponse leaves out identities that have no SVID yet.
func svidResponse(state *meshagent.State, entitled []*meshagent.Identity) (*workload.X509SVIDResponse, error) {
	own := concatenate(state.Bundle)
	response := &workload.X509SVIDResponse{FederatedBundles: map[string][]byte{}}
	hints := hints{}
	for _, identity := range entitled {
		if identity.SVID == nil {
			continue
		}
		response.Svids = append(response.Svids, &workload.X509SVID{
			SpiffeId:    identity.ID.String(),
			X509Svid:    slices.Concat(identity.SVID.Certificates...),
			X509SvidKey: identity.SVID.Key,
			Bundle:      own,
			Hint:        hints.of(identity),
		})
		addFederated(response.FederatedBundles, identity)
	}
	if len(response.Svids) == 0 || len(own) == 0 {
		return nil, nil
	}
	return response, nil
}

// hints are those of one response: there each is unique (Workload API 5.2.1), and the
// first identity keeps it, since the order is stable.
type hints map[string]bool

func (h hints) of(identity *meshagent.Identity) string {
	hint := identity.Entry.GetHint()
	if h[hint] {
		return ""
	}
	h[hint] = true
	return hint
}

func bundlesResponse(state *meshagent.State, entitled []*meshagent.Identity) (*workload.X509BundlesResponse, error) {
	if state.Bundle == nil {
		return nil, nil
	}
	response := &workload.X509BundlesResponse{Bundles: map[string][]byte{state.Bundle.TrustDomain().IDString(): concatenate(state.Bundle)}}
	for _, identity := range entitled {
		addFederated(response.Bundles, identity)
	}
	return response, nil
}

// addFederated leaves out an empty bundle (everything is revoked): a client takes
// the message as the full state, and an absent trust domain is not trusted.
func addFederated(bundles map[string][]byte, identity *meshagent.Identity) {
	for _, foreign := range identity.Federated {
		if der := concatenate(foreign); len(der) > 0 {
			bundles[foreign.TrustDomain().IDString()] = der
		}
	}
}

// concatenate puts a bundle's certificates one behind the other, DER.
func concatenate(bundle *x509bundle.Bundle) []byte {
	var der []byte
	if bundle != nil {
		for _, authority := range bundle.X509Authorities() {
			der = append(der, authority.Raw...)
		}
	}
	return der
}
