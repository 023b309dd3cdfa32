package server

import (
	"bytes"
	"context"
	"crypto/rand"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
	"github.com/entente-mesh/entente/ca"
	"github.com/entente-mesh/entente/ca/domain"
	"github.com/entente-mesh/entente/ca/wire"
	"github.com/entente-mesh/entente/federation"
	"github.com/entente-mesh/entente/federation/bundle"
	"github.com/entente-mesh/entente/federation/catalog"
)

const (
	defaultTokenLife = 15 * time.Minute
	minTokenLife     = time.Second
)

// adminDoor is for operators, over the unix socket, and for administrators as far as their
// roles go.
type adminDoor struct {
	ententev1.UnimplementedAdminServer
	server *Server
}

func (d adminDoor) Status(ctx context.Context, _ *ententev1.StatusRequest) (*ententev1.StatusResponse, error) {
	s := d.server
	info, subscribers := s.Info(), s.Subscribers()
	gates, err := s.Gate(ctx)
	if err != nil {
		gates = nil // who has acknowledged what is not known
	}
	resp := &ententev1.StatusResponse{
		NodeId:      s.NodeID,
		LeaderId:    info.LeaderID,
		RaftState:   info.RaftState,
		AgeSeconds:  seconds(info.Age),
		Instances:   wire.FromInstances(s.Feed.Instances()),
		Subscribers: uint32(subscribers.Subscribers),

		AcknowledgedRevision: subscribers.Acknowledged,

		Quorum:             info.NoQuorumSince.IsZero(),
		NotAgreeing:        info.NotAgreeing,
		Disk:               info.Disk,
		ClockOffsetSeconds: info.ClockOffset.Seconds(),
		ClockKnown:         info.ClockKnown,
		ClockProblem:       info.ClockProblem,
		AppliedIndex:       info.Applied,
		LastIndex:          info.Last,
		LogBytes:           info.LogBytes, Files: filesToWire(info.Files),
		Audit: &ententev1.AuditLog{
			File: info.Audit.File, Bytes: info.Audit.Bytes, BoundBytes: info.Audit.Bound,
			SharesRaftDisk: info.Audit.SharesRaft, Problem: info.Audit.Problem,
		},
	}
	for _, behind := range subscribers.Behind[:min(len(subscribers.Behind), 10)] {
		resp.WaitingFor = append(resp.WaitingFor, behind.Name)
	}
	resp.Contradicted = contradictions(s.Feed)
	for _, o := range s.Feed.Older() {
		resp.Older = append(resp.Older, &ententev1.SubscriberLevel{Name: o.Name, Level: o.Level, TooOld: o.TooOld, Skipped: o.Skipped})
	}
	for _, i := range s.Isolated() {
		resp.Isolated = append(resp.Isolated, i.toWire())
	}
	if up := info.Upstream; up != nil {
		resp.Upstream = &ententev1.Upstream{KeyId: up.KeyID, Problem: up.Problem}
		if !up.NotAfter.IsZero() {
			resp.Upstream.NotAfter = up.NotAfter.Unix()
		}
	}
	if !resp.Quorum {
		resp.NoQuorumSince = info.NoQuorumSince.Unix()
	}
	held, followed := map[string]*statev1.ForeignBundle{}, s.followed(ctx, info.Foreign)
	s.State.Read(func(st *domain.State) {
		resp.Cluster, resp.Revision = st.Cluster(), st.Revision()
		resp.Changes = approvals(st)
		resp.Authorities = st.Authorities()
		resp.Autonomy = autonomies(st, time.Now(), gates)
		roles := rolesOf(ctx, st)
		resp.Instances = slices.DeleteFunc(resp.Instances, func(i *ententev1.Instance) bool {
			service, _ := st.Object("Service/" + i.GetService())
			return !roles.Sees(service.GetService().GetPath())
		})
		resp.Entries, resp.Agents, resp.WeakEntries = uint32(st.EntryCount()), uint32(st.AgentCount()), uint32(st.WeakEntryCount())
		for _, m := range st.Members() {
			resp.Members = append(resp.Members, &ententev1.MemberStatus{Member: m, VoterNow: info.Voters[m.GetId()]})
		}
		for _, peer := range st.Peers() {
			resp.Foreign = append(resp.Foreign, s.foreignStatus(st, peer, followed[peer]))
			held[peer], _ = s.Feed.ForeignBundle(st, peer)
		}
	})
	// Parsed without the state's lock: what a stranger wrote decides what that costs.
	for _, f := range resp.GetForeign() {
		if td, err := spiffeid.TrustDomainFromString(f.GetTrustDomain()); err == nil && held[td.Name()] != nil {
			if b, _, err := bundle.Parse(td, held[td.Name()].GetJwks()); err == nil {
				f.X509Authorities = uint32(len(b.X509))
			}
		}
	}
	return resp, nil
}

func (s *Server) foreignStatus(st *domain.State, peer string, fetched Fetched) *ententev1.ForeignBundleStatus {
	f := &ententev1.ForeignBundleStatus{TrustDomain: peer, AgeSeconds: -1, Error: fetched.Err}
	if !fetched.At.IsZero() {
		f.AgeSeconds = time.Since(fetched.At).Seconds()
	}
	for _, d := range st.DroppedKeys(peer) {
		f.Dropped = append(f.Dropped, &ententev1.DroppedKey{Id: d.ID, Use: ca.UseName(d.Use), BecauseOf: d.Other, Reason: d.Reason})
	}
	held, _ := s.Feed.ForeignBundle(st, peer)
	f.Sequence, f.Given = held.GetSequence(), held.GetGiven()
	if fetched, ok := st.FetchedBundle(peer); ok {
		f.Sha256 = federation.BundleHash(fetched.GetJwks())
	}
	return f
}

func (d adminDoor) CreateToken(ctx context.Context, req *ententev1.CreateTokenRequest) (*ententev1.CreateTokenResponse, error) {
	s := d.server
	if (req.GetNode() == nil) == (req.GetAgent() == nil) {
		return nil, status.Error(codes.InvalidArgument, "a token admits either a CA node or an agent: say which")
	}
	life := time.Duration(req.GetTtlSeconds()) * time.Second
	if life == 0 {
		life = defaultTokenLife
	}
	if life < minTokenLife || life > ca.MaxTokenLife {
		return nil, status.Errorf(codes.InvalidArgument, "a token lives between %v and %v, not %v", minTokenLife, ca.MaxTokenLife, life)
	}
	token := &ca.Token{Role: ca.RoleAgent, ID: strings.ToLower(rand.Text()), TrustDomain: s.TrustDomain, Seed: make([]byte, 32)}
	rand.Read(token.Seed)
	record := &statev1.Token{Id: token.ID, PublicKey: token.PublicKey(), NotAfter: time.Now().Add(life).Unix()}
	if req.GetNode() != nil {
		token.Role = ca.RoleNode
		record.Grant = &statev1.Token_Node{Node: req.GetNode()}
	} else {
		record.Grant = &statev1.Token_Agent{Agent: req.GetAgent()}
	}
	s.State.Read(func(st *domain.State) {
		if now := st.Now(); !now.IsZero() {
			record.NotAfter = now.Add(life).Unix() // Apply judges by the agreed time
		}
		token.ClusterID, token.Epoch = st.Cluster().GetId(), st.Cluster().GetEpoch()
		if req.GetFormat() != 1 {
			token.RecoveryKey = st.Cluster().GetRecoveryKey()
		}
		for _, m := range st.Members() {
			token.Addresses = append(token.Addresses, m.GetApiAddress())
			token.Pins = append(token.Pins, m.GetId())
		}
	})
	text, err := token.Text()
	if err != nil {
		return nil, status.Error(codes.Internal, err.Error())
	}
	resp := &ententev1.CreateTokenResponse{Token: text, Id: record.GetId(), NotAfter: record.GetNotAfter()}
	command := &statev1.Command{Body: &statev1.Command_CreateToken{CreateToken: &statev1.CreateToken{Token: record}}}
	if _, resp.Approval, err = s.changeMembers(ctx, command); err != nil {
		return nil, err
	}
	return resp, nil
}

func (d adminDoor) GetBundle(_ context.Context, req *ententev1.GetBundleRequest) (*ententev1.GetBundleResponse, error) {
	s := d.server
	td := req.GetTrustDomain()
	if td == "" || td == s.TrustDomain.Name() {
		jwks := s.Bundles.Public(req.GetWit())
		if len(jwks) == 0 {
			return nil, status.Errorf(codes.Unavailable, "%s has no authority yet, so there is no bundle to give away: try again in a moment; entente authority list shows what it waits for", s.TrustDomain.Name())
		}
		return &ententev1.GetBundleResponse{Jwks: jwks, Sha256: bundleHash(s.TrustDomain, jwks)}, nil
	}
	var held *statev1.ForeignBundle
	s.State.Read(func(st *domain.State) { held, _ = s.Feed.ForeignBundle(st, td) })
	if held == nil {
		return nil, status.Errorf(codes.NotFound, "this domain holds no bundle of %.255s: apply a Relationship with it first", td)
	}
	return &ententev1.GetBundleResponse{Jwks: held.GetJwks(), Sha256: federation.BundleHash(held.GetJwks())}, nil
}

func (d adminDoor) Apply(ctx context.Context, req *ententev1.ApplyRequest) (*ententev1.ApplyResponse, error) {
	s := d.server
	var plan applyPlan
	var forbidden *domain.Refusal
	s.State.Read(func(st *domain.State) {
		plan = planApply(st, req.GetObjects(), req.GetDeletes(), req.GetDryRun())
		forbidden = rolesOf(ctx, st).MayCarryOut(plan.body())
	})
	if plan.problem != nil {
		return nil, status.Error(codes.InvalidArgument, plan.problem.Error())
	}
	if forbidden != nil {
		return nil, refusalError(forbidden)
	}
	if err := s.check(&plan); err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	resp := &ententev1.ApplyResponse{Revision: plan.revision, Changes: plan.changes, Warnings: plan.warnings}
	if req.GetDryRun() || len(plan.command.GetUpserts())+len(plan.command.GetDeletes()) == 0 {
		return resp, nil
	}
	outcome, err := s.agreeObjects(ctx, plan)
	if err != nil {
		return nil, err
	}
	resp.Revision = outcome.Revision
	s.Log.Info("the catalogue was changed", "revision", ca.Revision(outcome.Revision).String(),
		"upserts", len(plan.command.GetUpserts()), "deletes", len(plan.command.GetDeletes()))
	return resp, nil
}

func filesToWire(files []File) (list []*ententev1.FileProblem) {
	for _, f := range files {
		list = append(list, &ententev1.FileProblem{What: f.What, Files: f.Paths, Why: f.Why, Since: f.Since.Unix(), None: f.None})
	}
	return list
}

// objectsAtOnce is how many objects one answer holds.
const objectsAtOnce = 1000

func (d adminDoor) ListObjects(ctx context.Context, req *ententev1.ListObjectsRequest) (*ententev1.ListObjectsResponse, error) {
	if req.GetKind() != "" && !slices.Contains(catalog.Kinds(), req.GetKind()) {
		return nil, status.Errorf(codes.InvalidArgument, "%.100q is no kind of objects; there are %s", req.GetKind(), strings.Join(catalog.Kinds(), ", "))
	}
	resp := &ententev1.ListObjectsResponse{}
	d.server.State.Read(func(st *domain.State) {
		resp.Revision = st.Revision()
		roles := rolesOf(ctx, st)
		after := ""
		if req.GetAfter() != nil {
			after = req.GetAfter().GetKind() + "/" + req.GetAfter().GetName()
		}
		for _, o := range st.Objects() {
			kind, name := catalog.KindName(o)
			switch {
			case domain.ObjectKey(o) <= after,
				req.GetKind() != "" && kind != req.GetKind(),
				req.GetName() != "" && name != req.GetName(),
				req.GetOwner() != "" && o.GetOwner() != req.GetOwner(),
				!roles.SeesObject(o):
			case len(resp.Objects) == objectsAtOnce:
				resp.More = true
				return
			default:
				resp.Objects = append(resp.Objects, o)
			}
		}
	})
	return resp, nil
}

// partBytes is how much of a change one log entry carries; it leaves room for the rest of
// the command.
const partBytes = 48 << 10

// agreeObjects has a change of the catalogue agreed, all or nothing. One that no log entry
// holds goes in parts, which mean nothing until the last command.
func (s *Server) agreeObjects(ctx context.Context, plan applyPlan) (domain.Outcome, error) {
	if proto.Size(plan.command) <= partBytes {
		return s.propose(ctx, plan.body())
	}
	for _, o := range plan.command.GetUpserts() {
		if n := proto.Size(o); n > partBytes {
			return domain.Outcome{}, status.Errorf(codes.InvalidArgument, "%s: %s has %d bytes, over %d: divide it", o.GetSource(), domain.ObjectKey(o), n, partBytes)
		}
	}
	id := make([]byte, 16)
	rand.Read(id)
	staged := func(parts uint32) *statev1.Command_ApplyStaged {
		return &statev1.Command_ApplyStaged{ApplyStaged: &statev1.ApplyStaged{Id: id, Parts: parts}}
	}
	parts := cutObjects(plan.command)
	for i, part := range parts {
		_, err := s.propose(ctx, &statev1.Command{Body: &statev1.Command_StageObjects{
			StageObjects: &statev1.StageObjects{Id: id, Part: uint32(i), Objects: part},
		}})
		if err != nil {
			s.forgetParts(ctx, i, staged(0))
			return domain.Outcome{}, err
		}
	}
	outcome, err := s.propose(ctx, &statev1.Command{IfRevision: plan.catalogue, Body: staged(uint32(len(parts)))})
	if err != nil {
		s.forgetParts(ctx, len(parts), staged(0))
	}
	return outcome, err
}

// forgetParts tidies up after a change that came to nothing. If it cannot, the state
// forgets by itself after a while.
func (s *Server) forgetParts(ctx context.Context, sent int, forget *statev1.Command_ApplyStaged) {
	if sent == 0 {
		return
	}
	if _, err := s.propose(context.WithoutCancel(ctx), &statev1.Command{Body: forget}); err != nil {
		s.Log.Debug("parts of a change that failed stay until they end", "error", err)
	}
}

// cutObjects cuts a change into parts that fit into log entries.
func cutObjects(whole *statev1.ApplyObjects) []*statev1.ApplyObjects {
	part := &statev1.ApplyObjects{}
	parts := []*statev1.ApplyObjects{part}
	size := 0
	fit := func(m proto.Message) *statev1.ApplyObjects {
		n := proto.Size(m) + 8
		if size += n; size > partBytes && len(part.Upserts)+len(part.Deletes) > 0 {
			part, size = &statev1.ApplyObjects{}, n
			parts = append(parts, part)
		}
		return part
	}
	for _, o := range whole.GetUpserts() {
		into := fit(o)
		into.Upserts = append(into.Upserts, o)
	}
	for _, k := range whole.GetDeletes() {
		into := fit(k)
		into.Deletes = append(into.Deletes, k)
	}
	return parts
}

// applyPlan is what an Apply comes down to at one revision.
type applyPlan struct {
	revision  uint64
	catalogue uint64
	command   *statev1.ApplyObjects // only what really changes
	changes   []*ententev1.ObjectChange
	after     []*statev1.Object // the whole catalogue as it would be
	peers     []string
	dev       bool
	longest   time.Duration
	given     []given // bundles that it changes
	warnings  []string
	problem   error
}

// body is the plan as a command, which no other change of the catalogue may overtake.
func (p *applyPlan) body() *statev1.Command {
	return &statev1.Command{IfRevision: p.catalogue, Body: &statev1.Command_ApplyObjects{ApplyObjects: p.command}}
}

// planApply plans in one state; with before, it shows what the objects are in it.
func planApply(st *domain.State, upserts []*statev1.Object, deletes []*statev1.ObjectKey, before bool) applyPlan {
	plan := applyPlan{
		revision:  st.Revision(),
		catalogue: st.CatalogueRevision(),
		command:   &statev1.ApplyObjects{},
		dev:       st.Cluster().GetDev(),
		longest:   st.Lifetimes().Phase,
	}
	named := make(map[string]*statev1.Object) // nil: deleted
	for _, proposed := range upserts {
		key := domain.ObjectKey(proposed)
		if _, twice := named[key]; key == "" || twice {
			plan.problem = fmt.Errorf("%s: %q stands there twice, or has no kind that this release knows", proposed.GetSource(), key)
			return plan
		}
		o := proto.CloneOf(proposed)
		o.Revision = 0
		named[key] = o
		action := "created"
		have, ok := st.Object(key)
		if ok {
			action = "updated"
			if same(have, o) {
				action = "unchanged"
			}
		}
		if action != "unchanged" {
			plan.upsert(st, have, o)
		}
		change := &ententev1.ObjectChange{Key: wire.FromKey(key), Action: action}
		if before {
			change.Before = have
		}
		plan.changes = append(plan.changes, change)
	}
	for _, key := range deletes {
		name := key.GetKind() + "/" + key.GetName()
		if _, twice := named[name]; twice {
			plan.problem = fmt.Errorf("%.300s is both changed and deleted, or deleted twice", name)
			return plan
		}
		have, ok := st.Object(name)
		if !ok {
			plan.problem = fmt.Errorf("there is no %.300s to delete", name)
			return plan
		}
		named[name] = nil
		plan.command.Deletes = append(plan.command.Deletes, key)
		change := &ententev1.ObjectChange{Key: key, Action: "deleted"}
		if before {
			change.Before, change.Ends = have, st.Tables().Ends(have)
		}
		plan.changes = append(plan.changes, change)
	}
	for _, o := range st.Objects() {
		if _, replaced := named[domain.ObjectKey(o)]; !replaced {
			plan.after = append(plan.after, o)
		}
	}
	for _, o := range named {
		if o != nil {
			plan.after = append(plan.after, o)
		}
	}
	slices.SortFunc(plan.after, func(a, b *statev1.Object) int {
		return strings.Compare(domain.ObjectKey(a), domain.ObjectKey(b))
	})
	for _, o := range plan.after {
		if r := o.GetRelationship(); r != nil {
			plan.peers = append(plan.peers, r.GetTrustDomain())
		}
	}
	for _, o := range plan.command.GetUpserts() {
		entries, _ := ca.EntriesFor(st.TrustDomain(), o, plan.peers, plan.longest) // check says what is wrong
		for _, e := range entries {
			if err := st.CheckAnchored(e); err != nil && plan.problem == nil {
				plan.problem = fmt.Errorf("%s: %s: %w", o.GetSource(), domain.ObjectKey(o), err)
			}
		}
	}
	return plan
}

// upsert plans that next replaces have.
func (p *applyPlan) upsert(st *domain.State, have, next *statev1.Object) {
	p.command.Upserts = append(p.command.Upserts, next)
	if r := next.GetRelationship(); len(r.GetBootstrapBundle()) > 0 && !bytes.Equal(r.GetBootstrapBundle(), have.GetRelationship().GetBootstrapBundle()) {
		held, _ := st.FetchedBundle(r.GetTrustDomain())
		p.given = append(p.given, given{next, held, st.TakesGiven()})
	}
}

// same tells whether two objects say the same; where that was written does not count.
func same(a, b *statev1.Object) bool {
	x, y := proto.CloneOf(a), proto.CloneOf(b)
	x.Revision, y.Revision = 0, 0
	x.Source, y.Source = "", ""
	return proto.Equal(x, y)
}

// check looks at the whole catalogue as it would be, with FILE:LINE for each finding.
func (s *Server) check(plan *applyPlan) error {
	for _, g := range plan.given {
		warnings, err := s.checkGiven(g)
		if err != nil {
			return fmt.Errorf("%s: %s: %w", g.object.GetSource(), domain.ObjectKey(g.object), err)
		}
		plan.warnings = append(plan.warnings, warnings...)
	}
	if _, err := catalog.Compile(s.TrustDomain, plan.after, catalog.AllowLoopback(plan.dev)); err != nil {
		return err
	}
	for _, o := range plan.after {
		if _, err := ca.EntriesFor(s.TrustDomain, o, plan.peers, plan.longest); err != nil {
			return fmt.Errorf("%s: %s: %w", o.GetSource(), domain.ObjectKey(o), err)
		}
	}
	return nil
}
