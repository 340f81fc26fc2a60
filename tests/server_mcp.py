# SPDX-License-Identifier: Apache-2.0
"""
The MCP servers of `test_shim_mcp`, over stdio: `python server_mcp.py high|low`.

For the SDK of either major version. Everything is printed that fasten can print.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec

import anyio
import anyio.lowlevel
import mcp.server.lowlevel
from mcp.server.stdio import stdio_server

import fasten
from fasten.shim import mcp as shim
from fasten.shim.agent import Refused

IS_SDK_2 = find_spec("mcp.server.mcpserver") is not None
if IS_SDK_2:
    import mcp_types as types
    from mcp.server.mcpserver import MCPServer
else:
    from mcp import types
    from mcp.server.fastmcp import FastMCP as MCPServer


async def add(a: int, b: int) -> str:
    """
    Record a row; tell under which id this runs, and what the context says.
    """
    await anyio.lowlevel.checkpoint()
    fasten.emit("ORDER_PLACED", f"{a}+{b}")
    fasten.log.info("added", a=a)
    ctx = fasten.current()
    return f"{a + b} {ctx.request_id} {ctx.client}"


def fail() -> str:
    """
    Fail.
    """
    raise ValueError("as asked")


def refuse() -> str:
    """
    Decline.
    """
    raise Refused("not today")


async def ponder() -> str:
    """
    Record that this has begun, and end never.
    """
    fasten.emit("BATCH_PROCESSED", "pondering")
    await anyio.sleep_forever()
    return ""


def hours() -> str:
    """
    Tell under which id this runs, once what was recorded so far is stored.

    A client kills its server soon after it has closed the pipe.
    """
    assert fasten.flush(60)
    return fasten.current_request_id()


def high():
    """
    Return a server of the upper level.
    """
    server = MCPServer("shop")
    server.add_tool(add)
    server.add_tool(fail)
    server.add_tool(refuse)
    server.add_tool(ponder)
    server.resource("shop://hours")(hours)

    return shim.server(shim.server(server))


async def answer(name, arguments):
    """
    Call a tool by hand, as servers of the lower level do.
    """
    sync = {"fail": fail, "refuse": refuse}.get(name)
    text = sync() if sync else await {"add": add, "ponder": ponder}[name](**arguments)
    return [types.TextContent(type="text", text=text)]


def low():
    """
    Return a server of the lower level.
    """
    schema = {"type": "object"}
    if IS_SDK_2:

        async def list_tools(_ctx, _params):
            tools = [types.Tool(name="add", input_schema=schema)]
            return types.ListToolsResult(tools=tools)

        async def call_tool(_ctx, params):
            content = await answer(params.name, params.arguments)
            return types.CallToolResult(content=content)

        async def read(_ctx, params):
            content = types.TextResourceContents(uri=params.uri, text=hours())
            return types.ReadResourceResult(contents=[content])

        return shim.server(
            mcp.server.lowlevel.Server(
                "shop",
                on_list_tools=list_tools,
                on_call_tool=call_tool,
                on_read_resource=read,
            )
        )
    server = shim.server(mcp.server.lowlevel.Server("shop"), with_arguments=True)

    @server.list_tools()
    async def listed():
        return [types.Tool(name="add", inputSchema=schema)]

    @server.read_resource()
    async def read(_uri):
        return hours()

    server.call_tool()(answer)
    return server


async def serve(server):
    """
    Serve until the client goes.
    """
    async with stdio_server() as (receive, send):
        await server.run(receive, send, server.create_initialization_options())


def main():
    """
    Serve what is asked for.
    """
    if sys.argv[1] == "high":
        server = high()
        fasten.init()
        fasten.log.info("starting")
        server.run("stdio")
    else:
        server = low()
        fasten.init()
        fasten.log.info("starting")
        anyio.run(serve, server)
    fasten.log.info("ending")
    fasten.close(10)


if __name__ == "__main__":
    main()
