package server

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
	"github.com/entente-mesh/entente/ca"
	"github.com/entente-mesh/entente/ca/domain"
	"github.com/entente-mesh/entente/ca/roles"
)

const (
	maxEntryChanges = 20_000 // of a call
	groupBytes      = 32 << 10
	groupChanges    = 500
	groupsAtOnce    = 8
)

// ChangeEntries answers for each change. Those that are good go to agreement in groups
// that fit into log entries, each group as a whole; what does not hold any more when its
// turn comes fails its group, and every change of the group says so.
func (d adminDoor) ChangeEntries(ctx context.Context, req *ententev1.ChangeEntriesRequest) (*ententev1.ChangeEntriesResponse, error) {
	s := d.server
	if n := len(req.GetChanges()); n == 0 || n > maxEntryChanges {
		return nil, status.Errorf(codes.InvalidArgument, "%d changes of entries in a call, not 1 to %d", n, maxEntryChanges)
	}
	plan := s.planEntries(ctx, req.GetChanges())
	resp := &ententev1.ChangeEntriesResponse{Results: plan.results}
	if req.GetDryRun() {
		return resp, nil
	}
	var running sync.WaitGroup
	slots := make(chan struct{}, groupsAtOnce)
	for group := range plan.groups(req.GetChanges()) {
		slots <- struct{}{}
		running.Go(func() {
			defer func() { <-slots }()
			s.agreeEntries(ctx, req.GetChanges(), group, plan.results)
		})
	}
	running.Wait()
	return resp, nil
}

type entryPlan struct {
	results []*ententev1.EntryResult
}

// planEntries looks at every change in the state as it is.
func (s *Server) planEntries(ctx context.Context, changes []*statev1.EntryChange) entryPlan {
	plan := entryPlan{results: make([]*ententev1.EntryResult, len(changes))}
	seen := make(map[string]bool, len(changes))
	s.State.Read(func(st *domain.State) {
		roles := rolesOf(ctx, st)
		for i, change := range changes {
			id, next, refusal := st.PlanEntry(change)
			if forbidden := roles.MayChangeEntry(change); forbidden != nil {
				refusal = forbidden // what there is of others' is not theirs to know
			}
			result := &ententev1.EntryResult{Id: id}
			plan.results[i] = result
			have, exists := st.Entry(id)
			switch {
			case refusal != nil:
				fail(result, refusalError(refusal))
			case proto.Size(change) > partBytes:
				fail(result, status.Errorf(codes.InvalidArgument, "entry %s has over %d bytes: name fewer hosts, make several entries", id, partBytes))
			case seen[id]:
				fail(result, status.Errorf(codes.InvalidArgument, "entry %s is changed twice", id))
			case next == nil:
				result.Action = "deleted"
			case !exists:
				result.Action = "created"
			default:
				same := proto.CloneOf(have)
				same.Revision = 0
				result.Action, result.Revision = "updated", have.GetRevision()
				if proto.Equal(same, next) {
					result.Action = "unchanged"
				}
			}
			if result.GetCode() == 0 {
				result.Warnings = unknownPeers(st, next)
			}
			seen[id] = true
		}
	})
	return plan
}

// unknownPeers says of which domains an entry is to have the bundle and will not.
func unknownPeers(st *domain.State, e *statev1.Entry) (warnings []string) {
	peers := st.Peers()
	for _, td := range e.GetFederatesWith() {
		if !slices.Contains(peers, td) {
			warnings = append(warnings, fmt.Sprintf("there is no Relationship with %s, so its workloads get no bundle of it: apply one, or correct the name", td))
		}
	}
	return warnings
}

// groups yields the indexes of changes that are to be agreed together.
func (p entryPlan) groups(changes []*statev1.EntryChange) func(yield func([]int) bool) {
	return func(yield func([]int) bool) {
		var group []int
		size := 0
		for i, result := range p.results {
			if result.GetCode() != 0 || result.GetAction() == "unchanged" {
				continue
			}
			n := proto.Size(changes[i]) + 8
			if len(group) > 0 && (size+n > groupBytes || len(group) == groupChanges) {
				if !yield(group) {
					return
				}
				group, size = nil, 0
			}
			group, size = append(group, i), size+n
		}
		if len(group) > 0 {
			yield(group)
		}
	}
}

func (s *Server) agreeEntries(ctx context.Context, changes []*statev1.EntryChange, group []int, results []*ententev1.EntryResult) {
	command := &statev1.ChangeEntries{}
	for _, i := range group {
		command.Changes = append(command.Changes, changes[i])
	}
	outcome, err := s.propose(ctx, &statev1.Command{Body: &statev1.Command_ChangeEntries{ChangeEntries: command}})
	for _, i := range group {
		if err != nil {
			results[i].Action = ""
			fail(results[i], err)
		} else {
			results[i].Revision = outcome.Revision
		}
	}
	if err != nil {
		return
	}
	s.State.Read(func(st *domain.State) {
		for _, i := range group {
			if e, ok := st.Entry(results[i].GetId()); ok {
				results[i].Revision = e.GetRevision()
			}
		}
	})
}

func fail(r *ententev1.EntryResult, err error) {
	st := status.Convert(err)
	r.Code, r.Error = uint32(st.Code()), st.Message()
}

func (d adminDoor) ListEntries(ctx context.Context, req *ententev1.ListEntriesRequest) (*ententev1.ListEntriesResponse, error) {
	size := pageSize(req.GetPageSize())
	resp := &ententev1.ListEntriesResponse{}
	err := d.server.eachEntry(ctx, req, func(e *statev1.Entry) bool {
		if resp.More = len(resp.Entries) == size; !resp.More {
			resp.Entries = append(resp.Entries, e)
		}
		return !resp.More
	})
	return resp, err
}

func (d adminDoor) CountEntries(ctx context.Context, req *ententev1.ListEntriesRequest) (*ententev1.CountEntriesResponse, error) {
	resp := &ententev1.CountEntriesResponse{}
	everything := false
	d.server.State.Read(func(st *domain.State) {
		if everything = rolesOf(ctx, st).May(roles.SeeAll) == nil && !req.GetDeclared() && req.GetHost() == "" && req.GetPathPrefix() == ""; everything {
			resp.Entries = uint64(st.EntryCount())
		}
	})
	if everything {
		return resp, nil
	}
	err := d.server.eachEntry(ctx, req, func(*statev1.Entry) bool {
		resp.Entries++
		return true
	})
	return resp, err
}

func (d adminDoor) GetEntry(ctx context.Context, req *ententev1.GetEntryRequest) (*ententev1.GetEntryResponse, error) {
	resp := &ententev1.GetEntryResponse{}
	d.server.State.Read(func(st *domain.State) {
		if e, ok := st.Entry(req.GetId()); ok && rolesOf(ctx, st).Sees(e.GetPath()) {
			resp.Entry = e
		}
	})
	if resp.Entry == nil {
		return nil, status.Errorf(codes.NotFound, "there is no entry %.250s: see entente entry list", req.GetId())
	}
	return resp, nil
}

// entriesAtOnce is how many entries are looked at while the state is kept from changing.
const entriesAtOnce = 2000

// eachEntry calls f with the entries that a request asks for, by id, until f has enough.
// What changes meanwhile is seen or not.
func (s *Server) eachEntry(ctx context.Context, req *ententev1.ListEntriesRequest, f func(*statev1.Entry) bool) error {
	prefix := strings.TrimSuffix(req.GetPathPrefix(), "/")
	after, more := req.GetAfter(), true
	if req.GetDeclared() {
		after = max(after, ca.DeclaredPrefix) // they stand together
	}
	for more {
		if err := ctx.Err(); err != nil {
			return status.FromContextError(err).Err()
		}
		more = false
		s.State.Read(func(st *domain.State) {
			roles := rolesOf(ctx, st)
			entries, seen := st.EntriesAfter(after), 0
			if req.GetHost() != "" {
				entries = slices.Values(st.EntriesOnHost(req.GetHost()))
			}
			for e := range entries {
				switch {
				case e.GetId() <= after:
				case req.GetDeclared() && !domain.Declared(e.GetId()):
					return
				case prefix != "" && !ca.AtOrBelow(e.GetPath(), prefix):
				case !roles.Sees(e.GetPath()):
				case !f(e):
					return
				}
				if seen++; seen == entriesAtOnce && req.GetHost() == "" {
					after, more = e.GetId(), true
					return
				}
			}
		})
	}
	return nil
}
