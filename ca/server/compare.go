package server

import (
	"context"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
	"github.com/entente-mesh/entente/ca/domain"
	"github.com/entente-mesh/entente/ca/feed"
)

// Statements are what this node and the others state of their states.
type Statements interface {
	Own() (*ententev1.SignedStatement, error)
	Others() []*ententev1.SignedStatement
}

// compareDoor tells subscribers of other nodes what this one holds.
type compareDoor struct {
	ententev1.UnimplementedCompareServer
	server *Server
}

func (d compareDoor) Statement(context.Context, *ententev1.StatementRequest) (*ententev1.StatementResponse, error) {
	s := d.server
	resp := &ententev1.StatementResponse{}
	var err error
	if resp.Statement, err = s.Statements.Own(); err != nil {
		return nil, status.Error(codes.Unavailable, err.Error())
	}
	s.State.Read(func(st *domain.State) { resp.Cluster = st.Cluster() })
	return resp, nil
}

func (d compareDoor) Denials(context.Context, *ententev1.DenialsRequest) (*ententev1.DenialsResponse, error) {
	s := d.server
	resp := &ententev1.DenialsResponse{}
	s.State.Read(func(st *domain.State) {
		resp.Revision, resp.Members, resp.Distrust = st.Revision(), st.Members(), st.Distrust()
	})
	resp.Jwks, _ = s.Bundles.JWKS()
	return resp, nil
}

// contradictions are the CA nodes that this node's subscribers avoid.
func contradictions(f *feed.Feed) (list []*ententev1.Contradiction) {
	for _, c := range f.Contradicted() {
		list = append(list, &ententev1.Contradiction{Node: c.Node, Subscribers: c.Subscribers, Count: uint32(c.Count)})
	}
	return list
}

// Statement asks another member what it holds.
func (p *Peers) Statement(ctx context.Context, m *statev1.Member) (*ententev1.SignedStatement, error) {
	conn, err := p.to(m)
	if err != nil {
		return nil, err
	}
	resp, err := ententev1.NewCompareClient(conn).Statement(ctx, &ententev1.StatementRequest{})
	if err != nil {
		return nil, plain(err)
	}
	return resp.GetStatement(), nil
}
