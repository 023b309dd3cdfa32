package server

import (
	"context"
	"path"
	"slices"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
	"github.com/entente-mesh/entente/ca/domain"
	"github.com/entente-mesh/entente/ca/roles"
)

// promote makes a workload what this call needs: an administrator if its roles let it
// make it, a subscriber if its entry does.
func (s *Server) promote(c *caller, method string) error {
	if (method == ententev1.Sync_Sync_FullMethodName || method == ententev1.Compare_Denials_FullMethodName) && c.class == workload {
		may, undeclared := false, false
		s.State.Read(func(st *domain.State) { may, undeclared = st.MaySync(c.entry), st.UndeclaredEdge(c.entry) })
		if !may {
			return status.Errorf(codes.PermissionDenied, "%s may not call %s: gateways and edges follow it; if %s is an edge, its Service needs edge: true", c.class, method, c.entry.GetId())
		}
		c.class = subscriber
		if undeclared {
			if _, say := s.refusals.Say("undeclared edge "+c.entry.GetId(), time.Now()); say {
				s.Log.Warn("a Service follows Sync as an edge does and is not declared as one: add edge: true, a later release refuses it", "entry", c.entry.GetId(), "agent", c.agent.GetName())
			}
		}
		return nil
	}
	right := methods[method].right
	if right == 0 || c.class != workload {
		return nil
	}
	var refusal *domain.Refusal
	s.State.Read(func(st *domain.State) { refusal = st.Administrator(c.id.Path()).May(right) })
	if refusal != nil {
		return refusalError(refusal)
	}
	c.class = administrator
	return nil
}

// principal is the caller as a command names him: whose roles must allow it, empty if
// nobody's need to.
func (c caller) principal() string {
	if c.class == administrator {
		return c.id.Path()
	}
	return ""
}

// rolesOf is what the caller of an administrative method may do in this state.
func rolesOf(ctx context.Context, st *domain.State) *domain.Administrator {
	switch c := callerFrom(ctx); c.class {
	case local:
		return st.Operator()
	case administrator:
		return st.Administrator(c.id.Path())
	}
	return &domain.Administrator{}
}

// WhoAmI answers everybody who holds an identity of this domain: also that he has no
// role.
func (d adminDoor) WhoAmI(ctx context.Context, _ *ententev1.WhoAmIRequest) (*ententev1.WhoAmIResponse, error) {
	c := callerFrom(ctx)
	resp := &ententev1.WhoAmIResponse{Who: c.who(), Operator: c.class == local}
	if c.class == workload {
		d.server.State.Read(func(st *domain.State) { resp.Bindings = st.Administrator(c.id.Path()).Bindings })
	}
	return resp, nil
}

// propose has a command agreed in the caller's name and by his rights.
func (s *Server) propose(ctx context.Context, command *statev1.Command) (domain.Outcome, error) {
	c := callerFrom(ctx)
	if c.class != local && c.class != administrator {
		return domain.Outcome{}, status.Errorf(codes.PermissionDenied, "%s may not change the domain", c.class)
	}
	if adds(command) {
		governs := true
		s.State.Read(func(st *domain.State) { governs = rolesOf(ctx, st).May(roles.Govern) == nil })
		if err := s.Audit.Crowded(); err != nil && !governs {
			return domain.Outcome{}, err
		}
	}
	if err := s.Audit.Asked(c.who(), path.Base(methodFrom(ctx))); err != nil {
		return domain.Outcome{}, err
	}
	command.Actor, command.ActorKind, command.Principal = c.who(), statev1.ActorKind_ACTOR_KIND_OPERATOR, c.principal()
	if c.class == administrator {
		command.ActorKind = statev1.ActorKind_ACTOR_KIND_ADMINISTRATOR
	}
	return s.agree(ctx, command)
}

// adds tells a command from one that only takes entries and objects away.
func adds(command *statev1.Command) bool {
	switch body := command.GetBody().(type) {
	case *statev1.Command_ChangeEntries:
		return slices.ContainsFunc(body.ChangeEntries.GetChanges(), func(change *statev1.EntryChange) bool {
			_, deletes := change.GetAction().(*statev1.EntryChange_Delete)
			return !deletes
		})
	case *statev1.Command_ApplyObjects:
		return len(body.ApplyObjects.GetUpserts()) > 0
	}
	return true
}
