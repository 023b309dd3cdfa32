package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
)

const defaultAdminSocket = "/var/lib/entente/ca/admin.sock"

// adminFlags are the flags of every verb that talks to a CA node's admin socket.
type adminFlags struct {
	socket string
	json   bool
}

func (f *adminFlags) register(c *cobra.Command) {
	c.Flags().StringVar(&f.socket, "socket", defaultAdminSocket, "admin socket of a CA node of this domain")
	c.Flags().BoolVar(&f.json, "json", false, "print JSON")
}

// call dials the admin socket and runs do with its client.
func (f *adminFlags) call(ctx context.Context, do func(ententev1.AdminClient) error) error {
	if _, err := os.Stat(f.socket); err != nil {
		return status.Errorf(codes.Unavailable, "no CA node answers at %s: %v; is it running here, and is --socket right?", f.socket, err)
	}
	conn, err := grpc.NewClient("unix:"+f.socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return fmt.Errorf("dial %s: %w", f.socket, err)
	}
	defer conn.Close()
	return do(ententev1.NewAdminClient(conn))
}

// printJSON writes a message with stable, camel-case names.
func printJSON(w io.Writer, m proto.Message) error {
	raw, err := protojson.MarshalOptions{EmitUnpopulated: true}.Marshal(m)
	if err != nil {
		return err
	}
	return indentJSON(w, raw)
}

// indentJSON re-indents: protojson varies its white space on purpose.
func indentJSON(w io.Writer, raw []byte) error {
	var value any
	if err := json.Unmarshal(raw, &value); err != nil {
		return err
	}
	enc := json.NewEncoder(w)
	enc.SetIndent("", "  ")
	return enc.Encode(value)
}
