package main

import (
	"context"
	"fmt"
	"testing"

	"google.golang.org/grpc"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
)

// pages answers ListEntries from a list.
type pages struct {
	ententev1.AdminClient
	all []*statev1.Entry
}

func (p *pages) ListEntries(_ context.Context, req *ententev1.ListEntriesRequest, _ ...grpc.CallOption) (*ententev1.ListEntriesResponse, error) {
	resp := &ententev1.ListEntriesResponse{}
	for _, e := range p.all {
		if e.GetId() <= req.GetAfter() {
			continue
		}
		if len(resp.Entries) == int(req.GetPageSize()) {
			resp.More = true
			break
		}
		resp.Entries = append(resp.Entries, e)
	}
	return resp, nil
}

// Entries that were stored with a digest alone are found on every page.
func TestListEntriesWeak(t *testing.T) {
	p := &pages{}
	want := 0
	for i := range 2500 {
		e := &statev1.Entry{Id: fmt.Sprintf("entry/%04d", i), Selectors: []string{"unix:sha256:" + fmt.Sprintf("%064d", i), "unix:uid:7"}}
		if i%1000 == 999 || i == 2499 {
			e.Selectors = e.Selectors[:1]
			want++
		}
		p.all = append(p.all, e)
	}
	for _, weak := range []bool{true, false} {
		n := len(p.all)
		if weak {
			n = want
		}
		got, err := listEntries(t.Context(), p, &ententev1.ListEntriesRequest{}, 10_000, weak)
		if err != nil || len(got.GetEntries()) != n || got.GetMore() {
			t.Errorf("weak %v: %d entries, want %d: %v", weak, len(got.GetEntries()), n, err)
		}
		for _, e := range got.GetEntries() {
			if weak && anchored(e) {
				t.Errorf("%s names a user", e.GetId())
			}
		}
	}
}
